"""Linear cross entropy: hidden states in, loss and every gradient out, the logits never whole."""
