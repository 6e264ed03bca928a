"""A LoRA patch with its provenance: saved as a plain PEFT directory, loaded, composed, capped, merged."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperlora.errors import BaseMismatch, InputError
from hyperlora.files import from_hub, may_be_on_hub, new_directory, push_folder
from hyperlora.fingerprint import Fingerprint, fingerprint
from hyperlora.norm_control import hold, update_norm
from hyperlora.rank_cap import cap_rank
from hyperlora.structure import is_transposed, linear_shape

WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "hyperlora.json"
_PREFIX = "base_model.model."
_JOINED = " + "  # between the names, and hashes, of several generators


@dataclass(frozen=True)
class Provenance:
    """Where a patch comes from.

    Attributes:
        base: name of the base model, with `fingerprint` of its config and weights.
        generator: name of the generator (or method) and `generator_hash`, of its config and weights.
        documents: for each document its `sha256`, number of `tokens` and `weight` in a composition.
        version: of hyperlora.
        transposed: True when the patched modules store their weight as (d_in, d_out).
        fixed: modules that the generator changes in the same way for every document.
    """

    base: str
    fingerprint: Fingerprint
    generator: str = ""
    generator_hash: str = ""
    documents: tuple[dict[str, Any], ...] = ()
    version: str = ""
    transposed: bool = False
    fixed: tuple[str, ...] = ()


@dataclass
class Patch:
    """LoRA factors per module path: A (rank, d_in) and B (d_out, rank), the scale folded in. `rank` is the largest; of
    lower rank are only modules that the generator changes in the same way for every document."""

    factors: dict[str, tuple[Tensor, Tensor]]
    provenance: Provenance = field(repr=False)

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.factors.values()))[0].dtype

    @property
    def elements(self) -> int:
        """Numbers in the tensors."""
        return sum(t.numel() for pair in self.factors.values() for t in pair)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for pair in self.factors.values() for t in pair)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Patch":
        """A copy in another dtype or on another device."""
        moved = {path: (a.to(device, dtype), b.to(device, dtype)) for path, (a, b) in self.factors.items()}
        return Patch(moved, self.provenance)

    def cap_rank(self, rank: int) -> "Patch":
        """The nearest patch of at most `rank`, in Frobenius norm."""
        capped = {}
        for path, (a, b) in self.factors.items():
            small_a, small_b = cap_rank(a.float(), b.float(), rank)
            capped[path] = (small_a.to(a.dtype), small_b.to(b.dtype))
        return Patch(capped, self.provenance)

    @staticmethod
    def compose(
        patches: Sequence["Patch"],
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        norm_limit: float | None = None,
    ) -> "Patch":
        """The weighted sum of patches, exact at the sum of their ranks, or capped to `rank`.

        What a generator changes in the same way for every document is not added up: patches of one generator have it
        once between them, whatever their weights.

        Args:
            norm_limit: scale every module's update down to so many times the Frobenius norm of its largest part, so
                that many patches do not garble the model together.

        Raises:
            BaseMismatch: the patches are for different bases.
            InputError: not as many weights as patches, or a limit that is not positive.
        """
        if norm_limit is not None and not norm_limit > 0:
            raise InputError(f"a norm limit of {norm_limit} leaves nothing; use a positive number")
        weights = list(weights) if weights is not None else [1.0] * len(patches)
        if len(weights) != len(patches) or not patches:
            raise InputError(f"{len(patches)} patches need as many weights, got {len(weights)}")
        first = patches[0].provenance
        for patch in patches[1:]:
            check_base(patch.provenance, first.fingerprint, first.base)
        kinds = [patch.provenance.generator_hash for patch in patches]
        mixed = {kind for one in kinds if _JOINED in one for kind in one.split(_JOINED)}  # have it among their own
        fixed = {path: patches[0].factors[path] for path in first.fixed if len(set(kinds)) == 1}
        paths = sorted({path for patch in patches for path in patch.factors} - fixed.keys())
        factors, bounds = {}, {}
        for path in paths:
            parts = []
            for number, (weight, patch) in enumerate(zip(weights, patches, strict=True)):
                alike = path in patch.provenance.fixed  # as in all patches of its generator: of the first alone, whole
                if path in patch.factors and not (alike and kinds[number] in {*kinds[:number], *mixed}):
                    parts.append((1.0 if alike else weight, *patch.factors[path]))
            factors[path] = (
                torch.cat([a for _, a, _ in parts]),
                torch.cat([w * b for w, _, b in parts], dim=1),
            )
            bounds[path] = torch.stack([update_norm(a, w * b) for w, a, b in parts]).amax(0)
        documents = tuple(
            {**document, "weight": weight * document.get("weight", 1.0)}
            for weight, patch in zip(weights, patches, strict=True)
            for document in patch.provenance.documents
        )
        names, hashes = (
            _JOINED.join(dict.fromkeys(part for value in values for part in value.split(_JOINED)))
            for values in zip(*((p.provenance.generator, p.provenance.generator_hash) for p in patches), strict=True)
        )
        origin = replace(first, documents=documents, generator=names, generator_hash=hashes, fixed=tuple(fixed))
        composed = Patch(_uniform(factors), origin)
        composed = composed if rank is None else composed.cap_rank(rank)
        held = composed.factors
        if norm_limit is not None:
            held = {path: hold(a, b, norm_limit * bounds[path]) for path, (a, b) in held.items()}
        return Patch(held | fixed, origin)

    def merge(self, model: nn.Module) -> None:
        """Add the patch to the model's weights for good; to merge several, `compose` them first.

        Raises:
            BaseMismatch: another base, or one that a patch was merged into before.
            InputError: the modules are quantised.
        """
        self.check(model)
        modules: dict[str, Any] = {path: model.get_submodule(path) for path in self.factors}
        for path, module in modules.items():
            if not isinstance(module.weight, Tensor) or not module.weight.is_floating_point():
                raise InputError(f"{path} is quantised and cannot be merged; keep the patch beside the model")
        with torch.no_grad():
            for path, (a, b) in self.factors.items():
                module, weight = modules[path], modules[path].weight
                delta = b.float().to(weight.device) @ a.float().to(weight.device)
                weight += (delta.T if is_transposed(module) else delta).to(weight.dtype)

    def check(self, model: nn.Module, found: Fingerprint | None = None) -> None:
        """Raises BaseMismatch unless this patch was made for `model` and fits its modules; `found` is its fingerprint,
        where that is known."""
        name = getattr(model.config, "_name_or_path", "") or "the given model"
        check_base(self.provenance, found or fingerprint(model), name)
        for path, (a, b) in self.factors.items():
            try:
                shape = linear_shape(model.get_submodule(path))
            except AttributeError:
                shape = None
            if shape != (a.shape[1], b.shape[0]):
                raise BaseMismatch(
                    f"the patch changes {path} of shape {(a.shape[1], b.shape[0])}; this base has {shape}"
                )

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write a PEFT adapter directory, atomically.

        Raises:
            InputError: the directory exists (without `force`, or it is no patch's), the disk cannot be written, a value
                is not finite.
        """
        from peft import LoraConfig

        tensors = {}
        for name, (a, b) in self.factors.items():
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise InputError(f"the patch has non-finite values in {name}; it was not saved")
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        lower = {path: len(a) for path, (a, _) in self.factors.items() if len(a) < self.rank}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            rank_pattern=lower,
            alpha_pattern=lower,
            target_modules=sorted(self.factors),
            fan_in_fan_out=self.provenance.transposed,
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=self.provenance.base,
        )
        with new_directory(Path(path), PROVENANCE, force) as folder:
            config.save_pretrained(str(folder))
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / PROVENANCE).write_text(json.dumps(asdict(self.provenance), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Patch":
        """Read a patch that `save` wrote, PEFT's scale folded in; shapes are checked before any tensor is read.

        Args:
            path: a directory, or a hub repository (user/name).

        Raises:
            InputError: no patch there, or a damaged one.
        """
        folder, names = Path(path), (WEIGHTS, CONFIG, PROVENANCE)
        if not folder.parent.is_dir() and may_be_on_hub(path):
            folder = from_hub("patch", str(path), names)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing and (held := sorted(folder.glob(f"*/{PROVENANCE}"))):
            raise InputError(f"{folder} holds patches of several documents; name one of them, such as {held[0].parent}")
        if missing:
            raise InputError(f"{folder} is not a hyperlora patch: no {', '.join(missing)}")
        try:
            config = json.loads((folder / CONFIG).read_text())
            record = json.loads((folder / PROVENANCE).read_text())
            record["fingerprint"] = Fingerprint(**record["fingerprint"])
            record |= {name: tuple(record.get(name, ())) for name in ("documents", "fixed")}
            provenance = Provenance(**record)
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                factors = _read_factors(file, config)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} holds a damaged patch ({error}); generate it again") from error
        return Patch(factors, provenance)

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the PEFT directory to `repository` (user/name) and return its address."""
        return push_folder(self.save, repository, private, token)


def check_base(provenance: Provenance, found: Fingerprint, name: str) -> None:
    """Raises BaseMismatch, naming both bases, unless `found` is the base that a patch or generator was made for."""
    wanted = provenance.fingerprint
    if not wanted.same(found):
        raise BaseMismatch(
            f"made for base {provenance.base} ({wanted.config}/{wanted.weights}), "
            f"not for {name} ({found.config}/{found.weights}); load the base it was made for"
        )


def _read_factors(file: Any, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    keys = list(file.keys())
    names = sorted(key[: -len(".lora_A.weight")] for key in keys if key.endswith(".lora_A.weight"))
    if not names:
        raise ValueError("no LoRA tensors")
    scales = {}
    for name in names:
        rank, scales[name] = _rank_and_scale(config, name.removeprefix(_PREFIX))
        shape_a = file.get_slice(f"{name}.lora_A.weight").get_shape()
        shape_b = file.get_slice(f"{name}.lora_B.weight").get_shape()
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
            raise ValueError(f"{name} has shapes {shape_a} and {shape_b} at rank {rank}")
    factors = {}
    for name, scale in scales.items():
        a, b = file.get_tensor(f"{name}.lora_A.weight"), file.get_tensor(f"{name}.lora_B.weight")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{name} has non-finite values")
        factors[name.removeprefix(_PREFIX)] = (a, b * scale)
    return factors


def _rank_and_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """What PEFT's config says of a module."""
    rank = int((config.get("rank_pattern") or {}).get(path, config["r"]))
    alpha = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
    if rank < 1 or not math.isfinite(alpha):
        raise ValueError(f"{CONFIG} says rank {rank}, alpha {alpha}")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _uniform(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill every module up to the largest rank with zeros."""
    rank = max(a.shape[0] for a, _ in factors.values())
    pad = nn.functional.pad
    return {
        path: (pad(a, (0, 0, 0, rank - a.shape[0])), pad(b, (0, rank - b.shape[1]))) for path, (a, b) in factors.items()
    }
