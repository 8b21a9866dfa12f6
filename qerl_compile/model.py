"""What a transformed model is: the same object, of a subclass of its own class.

`transform` swaps `model.__class__` for a subclass with the same name, as FSDP2 does, so the result is still
`isinstance(model, LlamaForCausalLM)` and everything that is not listed here is Hugging Face's own code:

    forward            as before; with `decode="whole"`, calls that carry a cache run as one graph. Another compiler
                       (torch.compile of the model, or what `generate` starts for a static cache on a GPU) breaks its
                       graph there: it knows no passes
    to, half, cuda …   a move to a device moves what is owned and derives the links anew; a change of dtype is refused,
                       since it would cast block scales and adapters
    copy.deepcopy      copies what is owned, derives the links, compiles afresh
    save_pretrained    writes the adapter, for a model that has one is a PeftModel as well (peft_face.py). Without one a
                       model that holds nothing packed, such as one whose full weights are trained, is an ordinary
                       dense model, and Hugging Face saves it; a packed one is refused, naming the exporters: its
                       state_dict holds tensors that only they describe
    gradient_checkpointing_enable, activation_checkpointing_enable
                       switch the recompute pass on (Hugging Face's own would hide the linears); a model that comes
                       with it switched on gets the pass instead

`TransformState` hangs on the model as `model.qerl`: recipe, plan, compiler choice. It holds no tensors.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from qerl_compile.attach import link, unlink
from qerl_compile.backend import GraphCompiler
from qerl_compile.errors import ModelError
from qerl_compile.isolation import captured_by_others
from qerl_compile.passes.quantize import CACHE_SCALES
from qerl_compile.peft_face import peft_class
from qerl_compile.plan import Plan
from qerl_compile.recipe import Recipe
from qerl_compile.region_calls import compile_regions, compile_whole


@dataclass
class TransformState:
    """What was done to a model.

    Attributes:
        recipe: the recipe, as given.
        plan: the plan, as carried out.
        inner: inner compiler.
        decode: "regional" or "whole": how calls with a cache are compiled.
        recompute: whether the recompute pass runs.
        base_name: where the weights came from; adapter files and model cards name it.
        compilers: the graph compilers in use; `compilers[i].graphs` counts graphs.
    """

    recipe: Recipe
    plan: Plan
    inner: str = "inductor"
    decode: str = "regional"
    recompute: bool = False
    base_name: str = ""
    compilers: list[GraphCompiler] = field(default_factory=list)


class QerlModel(nn.Module):
    """Mixed in before the model's own class; see the module's essay."""

    qerl: TransformState

    def compile_graphs(self) -> None:
        """Set up compilation afresh; graphs are compiled when first called."""
        self.qerl.compilers.clear()
        compile_regions(self, self.qerl)
        whole = compile_whole(self, self.qerl) if self.qerl.decode == "whole" else None
        self.__dict__["_qerl_whole"] = whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _refuse_cast(self, fn)
        probe = next(self.parameters())
        if fn(probe[:0]).device == probe.device:
            return self
        unlink(self, self.qerl.plan)
        try:
            super()._apply(fn, recurse)
        finally:
            link(self, self.qerl.plan)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        unlink(self, self.qerl.plan)
        try:
            state = {key: value for key, value in self.__dict__.items() if key not in ("_qerl_whole", "qerl")}
            new.__dict__.update(copy.deepcopy(state, memo))
        finally:
            link(self, self.qerl.plan)
        new.__dict__["qerl"] = TransformState(**{**vars(self.qerl), "compilers": []})
        link(new, new.qerl.plan)
        new.compile_graphs()
        return new

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a model without adapters and without packed weights; refuse a packed one: see the module's essay."""
        if not self.qerl.plan.packs:
            measured = self.qerl.recipe.calibration
            if measured is not None and measured.kv_cache == "fp8" and "state_dict" not in kwargs:
                # scales of a cache are an exporter's to write: an ordinary model has no tensors of these names
                state = self.state_dict().items()
                kwargs["state_dict"] = {name: t for name, t in state if name.rpartition(".")[2] not in CACHE_SCALES}
            super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            return
        raise ModelError(
            where=f"save_pretrained({str(save_directory)!r})",
            expected="an exporter, since packed tensors need their format written beside them",
            got="a transformed model without adapters",
            do="Use qerl_compile.export(model, DIR, target='vllm').",
        )

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Switch the recompute pass on; only what enters a layer is then saved for backward."""
        self._recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        """Switch the recompute pass off."""
        self._recompute(False)

    activation_checkpointing_enable = gradient_checkpointing_enable  # their name from transformers 5.23 on
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _recompute(self, wanted: bool) -> None:
        if self.qerl.recompute != wanted:  # trainers ask again and again; each change compiles afresh
            self.qerl.recompute = wanted
            self.compile_graphs()


def become_qerl(model: nn.Module, state: TransformState) -> None:
    """Swap the class of `model` for its qerl subclass and compile; the object stays the same."""
    cls = type(model)
    hiding = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in hiding:
        vars(module)["gradient_checkpointing"] = False
    state.recompute = state.recompute or bool(hiding)
    model.__class__ = _subclass(cls, adapted=bool(state.plan.lora))
    model.__dict__["qerl"] = state
    cast(QerlModel, model).compile_graphs()


@functools.cache
def _subclass(cls: type[nn.Module], *, adapted: bool) -> type[nn.Module]:
    @torch._dynamo.disable(reason="a transformed model has compiled calls of its own")
    def as_it_is(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    @functools.wraps(cls.forward)  # generate() and trainers read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_inner_outputs(self, kwargs)
        if captured_by_others():
            return as_it_is(self, *args, **kwargs)
        whole = self.__dict__.get("_qerl_whole")
        cached = kwargs.get("past_key_values") is not None
        if whole is not None and cached and not torch.compiler.is_compiling():
            return whole(*args, **kwargs)
        return cls.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return (peft_class if adapted else type)(cls.__name__, (QerlModel, cls), body)


INNER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def _refuse_inner_outputs(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what transformers collects by hooks within the layers, which it would leave on them for ever."""
    wanted = [key for key in INNER_OUTPUTS if kwargs.get(key) or getattr(model.config, key, False)]
    if wanted:
        raise ModelError(
            where=type(model).__name__,
            expected="a call for logits and loss, since decoder layers are compiled graphs that hooks cannot look into",
            got=f"{wanted[0]}={kwargs.get(wanted[0]) or True!r}",
            do="Set it to False; a forward hook of your own on the final norm has the last hidden states.",
        )


def _refuse_cast(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        after = fn(torch.zeros(1, dtype=dtype)).dtype
        if after != dtype and any(p.dtype == dtype for p in model.parameters()):
            raise ModelError(
                where=type(model).__name__,
                expected="a transformed model to keep its dtypes",
                got=f"a cast of {dtype} tensors to {after}, which would also cast adapters and block scales",
                do=f"Load the model with dtype={after} before transforming it.",
            )
