"""The "triton" backend: `launch` is what dispatch sees; `forward`, `backward`, `reduce` hold the kernels."""
