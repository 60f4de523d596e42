"""The forward of a causal language model of transformers that hands hidden states and head to the loss."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_outputs

from ..linear.functional import linear_cross_entropy

# Models whose forward was read: a base model, an nn.Linear named lm_head, in Gemma 2 a softcap, and the loss. Any other
# is taken if its forward has the same code as one of theirs.
_READ = ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "MistralForCausalLM")


class LinearHead:
    """Mixed into the class of one model by `put`.

    A class, not a forward of the instance: DataParallel's replicas, pickle and deepcopy then have it too, and whoever
    replaces the instance's forward, as accelerate does, finds it beneath.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_new, (stock_class(self),), *super().__reduce_ex__(protocol)[2:])


def check(model: Any, causal: bool, softcap: float | None) -> None:
    """Refuse a model whose forward or head is not what `put` takes, or that has a softcap besides the one asked for.

    Raises:
        TypeError: which, and what to do.
    """
    cls = stock_class(model)
    if not causal or not any(_code(cls) == _code(getattr(transformers, name)) for name in _READ):
        raise TypeError(
            f"linear=True knows the forward of {', '.join(_READ)} and of models with the same code, not that of "
            f"{cls.__name__}, which may do something else between head and loss; drop linear=True"
        )
    if "forward" in vars(model):
        raise TypeError(
            f"the forward of this {cls.__name__} was replaced (by accelerate, TRL or another patch), so that "
            "linear=True would have no effect; patch before that"
        )
    if softcap is not None and _has_softcap(cls) and model.config.final_logit_softcapping is not None:
        own = model.config.final_logit_softcapping
        raise TypeError(f"expected no softcap, since {cls.__name__} has its own, {own}; drop it")
    _head(model)


def put(model: Any) -> None:
    """Replace the model's class by one with the other forward."""
    stock: Any = type(model)
    model.__class__ = _class(stock)


def remove(model: Any) -> None:
    """Undo `put`.

    Raises:
        RuntimeError: someone else replaced the class since.
    """
    if isinstance(model, LinearHead):
        stock = stock_class(model)
        if type(model) is not _class(stock):
            raise RuntimeError(
                f"the class of the model was replaced since patch(linear=True), by {type(model).__mro__[1].__name__}; "
                "undo that first"
            )
        model.__class__ = stock


def stock_class(model: Any) -> Any:
    """The model's class, without ours."""
    classes = type(model).__mro__
    return classes[classes.index(LinearHead) + 1] if LinearHead in classes else classes[0]


def shifted(labels: Tensor, ignore_index: int) -> Tensor:  # (..., T) -> (..., T)
    """The label that each position is judged by: the next; none for the last."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def divisor(num_items: int | Tensor | None, like: Tensor) -> Tensor | None:  # () or (1,)
    """Of a mean; as a tensor, which may be 0: a batch without labels has a loss of NaN, not an error."""
    return None if num_items is None else torch.as_tensor(num_items, device=like.device)


@functools.cache
def _class(stock: Any) -> Any:
    names = list(inspect.signature(stock.forward).parameters)[1:]  # without self
    has_softcap = _has_softcap(stock)  # torch.compile cannot look into sources

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        if len(args) > len(names) or keywords.keys() & set(names[: len(args)]):
            return stock.forward(self, *args, **keywords)  # which says what is wrong
        given = dict(zip(names, args, strict=False)) | keywords
        # The name is Liger's and TRL's for it.
        skip = given.pop("skip_logits", None)
        kept = given.get("logits_to_keep", 0)
        asked = not (isinstance(kept, int) and kept == 0) or not (self.training if skip is None else skip)
        if given.get("labels") is None or asked:
            return stock.forward(self, **given)
        return _forward(self, given, self.config.final_logit_softcapping if has_softcap else None)

    return type(stock.__name__, (LinearHead, stock), {"__module__": stock.__module__, "forward": forward})


def _new(stock: Any) -> Any:
    return _class(stock).__new__(_class(stock))


def _forward(model: Any, given: dict[str, Any], softcap: float | None) -> Any:
    for_base, options = dict(given), dict(model.loss_function.keywords)
    labels, shift_labels = for_base.pop("labels"), for_base.pop("shift_labels", None)
    num_items, ignore_index = for_base.pop("num_items_in_batch", None), for_base.pop("ignore_index", -100)
    return_dict = for_base.pop("return_dict", None)
    for_base.pop("logits_to_keep", None)
    outputs = model.base_model(**for_base, return_dict=True)
    hidden, head = outputs.last_hidden_state, _head(model)
    if softcap is not None:
        # The options apply to logits that the model has capped, but the formula scales first.
        options["softcap"] = softcap * abs(options.get("logit_scale", 1.0))
    target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        target.to(hidden.device),
        linear_bias=head.bias,
        ignore_index=ignore_index,
        dtype=None if hidden.dtype == torch.float64 else torch.float32,
        num_items=divisor(num_items, hidden),
        **options,
    )
    has_cross = hasattr(outputs, "cross_attentions")
    result = (
        modeling_outputs.CausalLMOutputWithCrossAttentions if has_cross else modeling_outputs.CausalLMOutputWithPast
    )
    fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    found = result(loss=loss, **fields)
    return found if (model.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


def _head(model: Any) -> nn.Linear:
    """The model's head; PEFT's trained copy of it, where there is one.

    Raises:
        TypeError: it is something else than an nn.Linear with its whole weight.
    """
    head = model.lm_head
    if hasattr(head, "modules_to_save"):
        named = [] if head.disable_adapters else head.active_adapter  # one name or several
        active = [named] if isinstance(named, str) else named
        head = head.modules_to_save[active[0]] if active else head.original_module
    hooked = type(head) is nn.Linear and (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    if (
        type(head) is not nn.Linear
        or hooked
        or type(head.weight) not in (nn.Parameter, Tensor)
        or head.weight.dim() < 2
    ):
        raise TypeError(
            "linear=True reads the weight of an nn.Linear without calling it, but the model's lm_head is "
            f"{'one with hooks' if hooked else type(head).__name__} (adapters, hooks, quantised and sharded weights "
            "would go unheeded); call unpatch(model), then patch(model) without linear"
        )
    return head


def _has_softcap(cls: Any) -> bool:
    return "final_logit_softcapping" in _code(cls)


@functools.cache
def _code(cls: Any) -> str:
    """A class's forward, without what does not matter: its docstring, annotations, layout."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    except (OSError, TypeError):
        return f"no source of {cls}"
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return "".join(ast.dump(statement) for statement in function.body)
