"""The generator: encoder and hypernetwork behind one call, document in, patch out."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from hyperlora import __version__
from hyperlora.base_model import BaseModel, load_base
from hyperlora.encoder import Encoder
from hyperlora.errors import InputError, nearest
from hyperlora.files import push_folder, sha256
from hyperlora.generator_config import GeneratorConfig
from hyperlora.generator_files import StoredGenerator, stored_tensors, write_generator
from hyperlora.hypernet import HYPERNETS, Hypernet, Pair, Shape, Written
from hyperlora.norm_control import hold, update_norm
from hyperlora.patch import Patch, Provenance, check_base
from hyperlora.statistics import SiteStatistics, calibrate
from hyperlora.structure import (
    Site,
    attention_linears,
    attention_outputs,
    context_window,
    find_sites,
    is_transposed,
    linears,
    text_config,
)

_NON_FINITE = "the generator produced non-finite values; its weights do not suit this base or dtype"
Clock = dict[str, float]


class Generator(nn.Module):
    """Documents to LoRA factors for one base model. Holds the hypernetwork and the sites' calibration; the frozen
    base stays outside `state_dict`.

    Attributes:
        through: calls the hypernetwork where something stands around it, such as a training engine.
    """

    through: Callable[..., list[Written]] | None = None
    _origin: Provenance | None = None  # of weights that no longer change

    def __init__(self, base: BaseModel, config: GeneratorConfig, name: str = "untrained"):
        super().__init__()
        self.config, self.name = config, name
        self.sites = sites_of(base, config)
        self.statistics, self.hypernet = _modules(base, config, self.sites)
        self.encoder = Encoder(base, self.sites, config.chunk_tokens)
        if any(tensor.device != base.device for tensor in (*self.parameters(), *self.buffers())):
            self.to(base.device)

    @property
    def base(self) -> BaseModel:
        return self.encoder.base

    def calibrate(self, texts: Sequence[str], tokens: int = 512) -> None:
        """Measure the sites' statistics on generic `texts`, the first `tokens` of each or what the base reads."""
        tokens = min(tokens, context_window(self.base.model) - len(self.encoder.sink))
        ids = [self.encoder.sink + self.encoder.tokenize(text)[:tokens] for text in texts]
        calibrate(self.base, self.sites, self.statistics, ids, self.config.ridge)  # type: ignore[arg-type]

    @overload
    def generate(self, documents: str, clock: Clock | None = None) -> Patch: ...
    @overload
    def generate(self, documents: list[str] | tuple[str, ...], clock: Clock | None = None) -> list[Patch]: ...
    @torch.no_grad()
    def generate(self, documents: str | list[str] | tuple[str, ...], clock: Clock | None = None) -> Patch | list[Patch]:
        """The patch of a document, or those of a list of documents, in one forward pass.

        Args:
            clock: collects the seconds spent in `encode` and `hypernetwork`.

        Raises:
            InputError: a document of fewer than two tokens, or the hypernetwork gave non-finite values.
        """
        texts = [documents] if isinstance(documents, str) else list(documents)
        if not texts:
            return []
        ids = [self.encoder.tokenize(text) for text in texts]
        with _finite():
            factors = self.factors(ids, clock)
        origin = self.provenance
        patches = [self._patch(factors, n, [(text, ids[n])], origin) for n, text in enumerate(texts)]
        return patches[0] if isinstance(documents, str) else patches

    @torch.no_grad()
    def generate_together(self, documents: Sequence[str], clock: Clock | None = None) -> Patch:
        """One patch of several documents, at the rank of one document that is as long as all of them.

        They are read one by one, and what is written for them joins as that of the chunks of one document does: what
        a question selects in one of them is told from what stands in the others, which a sum of their patches
        (`Patch.compose`) cannot do.

        Args:
            clock: see `generate`.

        Raises:
            InputError: no documents, one of fewer than two tokens, or the hypernetwork gave non-finite values.
        """
        if not documents:
            raise InputError("no documents to make a patch of")
        ids = [self.encoder.tokenize(text) for text in documents]
        chunks = [chunk for own in ids for chunk in self.encoder.chunks(own)]
        with _finite(), self._rest_of(clock):
            pairs = self._joined(chunks, self.config.rank_of(sum(map(len, ids))), clock)
        modules = (*self.sites, *self.hypernet.fixed)
        factors = {module.path: pair for module, pair in zip(modules, pairs, strict=True)}
        return self._patch(factors, 0, list(zip(documents, ids, strict=True)), self.provenance)

    def _patch(
        self, factors: dict[str, Pair], index: int, read: list[tuple[str, list[int]]], origin: Provenance
    ) -> Patch:
        """Number `index` of a batch of factors, made of these texts and their tokens."""
        own = {site.path: (factors[site.path][0][index], factors[site.path][1][index]) for site in self.sites}
        fixed = {module.path: factors[module.path] for module in self.hypernet.fixed}
        if not all(bool(torch.isfinite(t).all()) for pair in (*own.values(), *fixed.values()) for t in pair):
            raise InputError(_NON_FINITE)
        own = _trimmed(own) | {path: (a[0].clone(), b[0].clone()) for path, (a, b) in fixed.items()}
        documents = ({"sha256": sha256(text.encode()), "tokens": len(ids), "weight": 1.0} for text, ids in read)
        return Patch(own, replace(origin, documents=tuple(documents)))

    @property
    def provenance(self) -> Provenance:
        """What the patches of this generator say of their origin, but for the documents. The hash covers the config
        and the weights as they are saved."""
        if self._origin is not None and not any(weight.requires_grad for weight in self.parameters()):
            return self._origin
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in sorted(stored_tensors(self.state_dict()).items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        self._origin = Provenance(
            base=self.base.name,
            fingerprint=self.base.fingerprint,
            generator=self.name,
            generator_hash=digest.hexdigest()[:16],
            version=__version__,
            transposed=is_transposed(self.base.model.get_submodule(self.sites[0].path)),
            fixed=tuple(module.path for module in self.hypernet.fixed),
        )
        return self._origin

    def calls(self, documents: Sequence[list[int]]) -> int:
        """How often `factors` calls the hypernetwork: for each batch of short documents and each chunk of long ones."""
        return sum(len(self.encoder.chunks(documents[numbers[0]])) for numbers in self._batches(documents))

    def _batches(self, documents: Sequence[list[int]]) -> list[list[int]]:
        """Numbers of the documents that are read together: one-chunk ones of one rank; each longer one is alone."""
        alone, together = [], dict[int, list[int]]()
        for number, ids in enumerate(documents):
            if len(self.encoder.chunks(ids)) > 1:
                alone.append([number])
            else:
                together.setdefault(self.config.rank_of(len(ids)), []).append(number)
        batches = []
        for numbers in together.values():
            for batch in self.encoder.batches([documents[number] for number in numbers]):
                batches.append([numbers[place] for place in batch])
        return batches + alone

    def factors(self, documents: Sequence[list[int]], clock: Clock | None = None, calls: int = 0) -> dict[str, Pair]:
        """Capped LoRA factors of a batch of documents (token ids), differentiable in the hypernetwork.

        Returns, per module path, A (documents, rank, d_in) and B (documents, d_out, rank); once where a module is
        changed in the same way for every document. Chunks are read one after the other, and what is written for them is
        joined, so that memory does not grow with a document's length; where gradients are wanted, it does.

        Args:
            clock: see `generate`.
            calls: call the hypernetwork at least so often, to no effect. Processes that share out its weights must all
                call it as often as the one that reads most.
        """
        with self._rest_of(clock):
            return self._stacked(documents, clock, calls)

    @contextmanager
    def _rest_of(self, clock: Clock | None) -> Iterator[None]:
        """Time all that is not the encoder, the rank cap included."""
        start, encoded = self.base.now(), (clock or {}).get("encode", 0.0)
        yield
        if clock is not None:
            rest = self.base.now() - start - (clock["encode"] - encoded)
            clock["hypernetwork"] = clock.get("hypernetwork", 0.0) + rest

    def _stacked(self, documents: Sequence[list[int]], clock: Clock | None, calls: int) -> dict[str, Pair]:
        batches = self._batches(documents)
        read = [self._read([documents[number] for number in batch], clock) for batch in batches]
        order = torch.tensor([number for batch in batches for number in batch]).argsort().to(self.base.device)
        stacked = {}
        for index, site in enumerate(self.sites):
            a, b = _stack([factors[index] for factors in read])
            stacked[site.path] = (a[order], b[order])
        same = read[0][len(self.sites) :]
        stacked |= {module.path: pair for module, pair in zip(self.hypernet.fixed, same, strict=True)}
        path = self.sites[0].path
        for _ in range(self.calls(documents), calls):
            idle = self._capped(self._write([documents[0][:2]], clock), self.config.rank)
            nothing = sum(0 * factor.sum() for pair in idle for factor in pair)
            stacked[path] = (stacked[path][0] + nothing, stacked[path][1])
        return stacked

    def _write(self, chunks: list[list[int]], clock: Clock | None) -> list[Written]:
        @contextmanager
        def timed() -> Iterator[None]:
            start = self.base.now()
            yield
            if clock is not None:
                clock["encode"] = clock.get("encode", 0.0) + self.base.now() - start

        reading = self.encoder.open(chunks, nullcontext if clock is None else timed)
        return (self.through or self.hypernet)(reading, self.statistics)

    def _capped(self, written: list[Written], rank: int) -> list[Pair]:
        """Factors per site of at most `rank`, and those of the fixed modules."""
        count = len(self.sites)
        own = self.hypernet.factors(written[:count], self._calibration, rank)
        return own + [(a, b) for a, b in written[count:]]

    def _read(self, documents: list[list[int]], clock: Clock | None) -> list[Pair]:
        """Factors of a batch of documents of one chunk each, or of one document whose chunks are read one at a time."""
        chunks, rank = self.encoder.chunks(documents[0]), self.config.rank_of(len(documents[0]))
        if len(chunks) > 1:
            return self._joined(chunks, rank, clock)
        return self._capped(self._write(documents, clock), rank)

    def _joined(self, chunks: list[list[int]], rank: int, clock: Clock | None) -> list[Pair]:
        """Factors of one patch of chunks that are read one at a time."""
        config, count = self.config, len(self.sites)
        state: list[Written] | None = None
        norms = []  # by chunk and site
        for chunk in chunks:
            written = self._write([chunk], clock)
            if config.norm_limit is not None:
                norms.append(self._norms(self._capped(written, rank)))
            if state is None:
                state = written
            else:
                joined = zip(state, written[:count], self._calibration, strict=False)
                state[:count] = [self.hypernet.join(w, more, stat, rank) for w, more, stat in joined]
        assert state is not None
        pairs = self._capped(state, rank)
        if config.norm_limit is not None:
            bounds = [config.norm_limit * torch.stack(own).amax(0) for own in zip(*norms, strict=True)]
            held = zip(pairs, bounds, self._calibration, strict=False)
            pairs[:count] = [hold(a, b, bound, stat.moment) for (a, b), bound, stat in held]
        return pairs

    def _norms(self, pairs: list[Pair]) -> list[torch.Tensor]:
        sites = zip(pairs, self._calibration, strict=False)
        return [update_norm(a, b, stat.moment) for (a, b), stat in sites]

    @property
    def _calibration(self) -> list[SiteStatistics]:
        return list(self.statistics)  # type: ignore[arg-type]

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, force: bool = False) -> None:
        """Write config.json and model.safetensors (hypernetwork in float16, calibration in float32), atomically.

        Raises:
            InputError: the directory exists (without `force`, or it is no generator's) or the disk cannot be written.
        """
        record = {
            "name": self.name,
            "version": __version__,
            "base": self.base.name,
            "fingerprint": vars(self.base.fingerprint),
            "sites": [site.to_dict() for site in self.sites],
            "generator": self.config.model_dump(),
        }
        write_generator(Path(path), record, stored_tensors(self.state_dict()), force)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        base: BaseModel | None = None,
        changes: GeneratorConfig | None = None,
        **options: Any,
    ) -> "Generator":
        """Load a generator: None for the one that ships with the package, a local directory, or a hub id.

        Args:
            base: the loaded base model; by default the one that the generator names is loaded, with `options`
                passed to `load_base`.
            changes: settings that are to be others than the generator's. Weights that they add are fresh ones.

        Raises:
            InputError: no generator there, a damaged one, or one whose weights are not of these settings.
            BaseMismatch: it was trained for another base.
        """
        stored = StoredGenerator.find(name)
        base = base or load_base(stored.wanted.base, **options)
        config = stored.config.changed(changes or GeneratorConfig())
        check_base(stored.wanted, base.fingerprint, base.name)
        sites = sites_of(base, config)
        if stored.sites != [site.to_dict() for site in sites]:
            other = "it shall have now" if sites_of(base, stored.config) != sites else "are found now; train it again"
            raise InputError(f"{stored.folder} was trained on other modules of {base.name} than {other}")
        with torch.device("meta"):  # nothing is allocated before the shapes are known to be right
            statistics, hypernet = _modules(base, config, sites)
        tensors = stored.tensors(
            {
                f"{part}.{key}": tuple(tensor.shape)
                for part, module in (("statistics", statistics), ("hypernet", hypernet))
                for key, tensor in module.state_dict().items()
            },
            changed=config != stored.config,
        )
        generator = cls(base, config, stored.name)
        generator.load_state_dict(generator.state_dict() | tensors)
        return generator.eval().requires_grad_(False)

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the generator to `repository` (user/name) and return its address."""
        return push_folder(self.save_pretrained, repository, private, token)


def sites_of(base: BaseModel, config: GeneratorConfig) -> list[Site]:
    """The modules of a base that patches of such a generator change. Raises UnsupportedBase."""
    layers = config.resolve_layers(text_config(base.model).num_hidden_layers)
    return find_sites(base.model, layers, config.modules) if config.modules else attention_outputs(base.model, layers)


def _modules(base: BaseModel, config: GeneratorConfig, sites: list[Site]) -> tuple[nn.ModuleList, Hypernet]:
    """Calibration and hypernetwork of a generator, with fresh weights."""
    if config.hypernet not in HYPERNETS:
        raise InputError(f"unknown hypernet {config.hypernet!r}; {nearest(config.hypernet, HYPERNETS)}")
    statistics = nn.ModuleList(SiteStatistics(site, config.moment_directions) for site in sites)
    read = range(max(site.layer for site in sites) + 1)
    writing = attention_outputs(base.model, read)
    attention = [module for module in attention_linears(base.model, read) if module not in writing]
    shape = Shape(sites, linears(base.model, read), attention, text_config(base.model).hidden_size)
    try:
        return statistics, HYPERNETS[config.hypernet](shape, **config.options)
    except TypeError as error:
        raise InputError(f"options of the hypernet {config.hypernet}: {error}") from error


@contextmanager
def _finite() -> Iterator[None]:
    """Raise InputError where a factorisation meets NaN before it can reach the patch."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise InputError(_NON_FINITE) from error


def _trimmed(factors: dict[str, Pair]) -> dict[str, Pair]:
    """Without the rows that are zero because a longer document stood in the same batch; one rank for all sites."""
    kept = {path: a.abs().amax(dim=1) > 0 for path, (a, _) in factors.items()}
    rank = max(1, max(int(rows.sum()) for rows in kept.values()))
    order = {path: torch.argsort(~rows, stable=True)[:rank] for path, rows in kept.items()}
    return {path: (a[order[path]].clone(), b[:, order[path]].clone()) for path, (a, b) in factors.items()}


def _stack(factors: list[Pair]) -> Pair:
    """Join batches of documents; smaller ranks are filled up with zeros."""
    rank = max(a.shape[1] for a, _ in factors)
    pad = nn.functional.pad
    return (
        torch.cat([pad(a, (0, 0, 0, rank - a.shape[1])) for a, _ in factors]),
        torch.cat([pad(b, (0, rank - b.shape[2])) for _, b in factors]),
    )
