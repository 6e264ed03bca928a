import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.packing import pack
from hyperlora.prompt import document_ids, encode
from hyperlora.session import Session
from hyperlora.structure import find_sites

PARTS = (
    ("Where does the ferry go?", "To Oskmere, on Tuesdays."),
    ("Who?", "Admiral."),
    ("What is the parrot called, and what does it know by heart?", "x"),
)


def test_packed_parts_are_what_they_are_alone(any_base: BaseModel) -> None:
    """Logits and gradients of every reply equal those of its prompt in a pass of its own, whatever stands beside it."""
    base, tokenizer = any_base, any_base.tokenizer
    prefix = encode(tokenizer, base.prompt.prefix)
    parts = [(document_ids(tokenizer, prompt), document_ids(tokenizer, reply)) for prompt, reply in PARTS]
    factors = {
        path: (a, torch.randn_like(b).mul_(0.1).requires_grad_())
        for path, (a, b) in fresh_adapter(base, 3, find_sites(base.model), 0).items()
    }
    leaves = [tensor for pair in factors.values() for tensor in pair]

    def run(chosen: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        with Session(base, 1, factors=factors, cached=False) as session:
            logits = pack(prefix, chosen, base.device).logits(session)
        return logits, torch.autograd.grad(logits.log_softmax(-1)[:, 5].sum(), leaves)

    together, gradients = run(parts)
    alone = [run([part]) for part in parts]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=1e-4, atol=1e-4)
    assert len(together) == sum(len(reply) for _, reply in parts)
    for number, gradient in enumerate(gradients):
        expected = torch.stack([single[number] for _, single in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # and the plain forward pass of one of them
    prompt, reply = parts[0]
    with torch.no_grad(), Session(base, 1, factors=factors):
        plain = base.model(input_ids=torch.tensor([prefix + prompt + reply])).logits[0, -1 - len(reply) : -1]
    torch.testing.assert_close(together[: len(reply)], plain.float(), rtol=1e-4, atol=1e-4)


def test_a_reply_needs_a_prompt(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="no token after the prefix"):
        pack([1], [([], [2, 3])], base.device)
