"""The hypernetwork: a document becomes a LoRA patch in one forward pass."""

from collections.abc import Sequence
from typing import Any

from hyperlora.base_model import BaseModel
from hyperlora.generator import Generator
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method, MethodSettings
from hyperlora.shared_state import SharedState


class Generated(Method):
    """The patch that hyperlora's generator makes of the document."""

    name = "generator"
    compresses = True
    sized_by = ("path",)
    revision = 2

    class Settings(MethodSettings):
        """`path`: a generator's directory or hub id; default the one that ships."""

        path: str | None = None

    def __init__(self, base: BaseModel, settings: Any, seed: int = 0):
        super().__init__(base, settings, seed)
        self.generator = Generator.from_pretrained(settings.path, base)
        numbers = sum(tensor.numel() for tensor in self.generator.state_dict().values())
        self.shared = SharedState("generator", self.generator.provenance.generator_hash, extra_elements=numbers)

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        patches = self.generator.generate([document.text for document in documents])
        return [Memory(patch=patch, shared=self.shared) for patch in patches]

    def identity(self) -> dict[str, Any]:
        return {"generator": self.shared.digest}
