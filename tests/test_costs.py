"""FLOPs, memory and break-even."""

import os
from typing import Any

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.compare.costs import break_even, flops, measure_costs, timed_while_counted
from hyperlora.data.items import Item, Question
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Document
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.methods.self_study import study
from hyperlora.methods.teaching import differences, teach
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.runtime import Runtime
from hyperlora.structure import find_sites

from .conftest import OPTIONS, TEXT, make_generator


def test_flops_follow_the_formula(base: BaseModel) -> None:
    """A prefill of n tokens costs 2 N n in the layers' matrices, attention, and one row of the output layer."""
    runtime, ids = Runtime(base), document_ids(base.tokenizer, TEXT)[:60]
    memory = Memory(text=tuple(ids))
    counted = flops(lambda: runtime.generate_ids([memory], [runtime.question(0, "Who?")], 1))
    config = base.model.config
    before = encode(base.tokenizer, base.prompt.prefix)
    n = len(ids) + len(before) + len(encode(base.tokenizer, GAP)) + len(runtime.question(0, "Who?").ids)
    layers = sum(p.numel() for name, p in base.model.named_parameters() if "layers" in name and p.dim() == 2)
    head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * n * n * config.hidden_size
    assert counted == pytest.approx(2 * layers * n + 2 * head + attention, rel=0.02)


def test_flops_of_a_distillation_step_follow_the_formula(base: BaseModel) -> None:
    """Forward, and backward to the activations only, because the base is frozen; attention's backward is 2.5 times its
    forward. The adapters are on the MLP outputs of all layers, so that the first layer's backward ends there."""
    held = study(base, Document("a", TEXT), seed=0, conversations=16, reply_tokens=6)[:8]
    lessons, layers = teach(base, held, [3]), range(4)
    factors = fresh_adapter(base, 4, find_sites(base.model, list(layers)), 0)

    def step() -> None:
        kl, surprise, far = differences(base, lessons, [3], factors)
        (kl + surprise + far.mean()).backward()

    counted, config = flops(step), base.model.config
    replies = sum(len(lesson.reply) for lesson in lessons)
    n = len(encode(base.tokenizer, base.prompt.prefix)) - len(lessons) + replies
    n += sum(len(lesson.question) for lesson in lessons)
    width, inner = config.hidden_size, config.intermediate_size
    matrices = [p.numel() for name, p in base.model.named_parameters() if "layers.0." in name and p.dim() == 2]
    attention = 4 * n * n * width
    adapter = 2 * 4 * (width + inner)  # a token through A and B
    forward = config.num_hidden_layers * (2 * sum(matrices) * n + attention + adapter * n)
    # No gradient flows below the first adapted module; A and B need those of their weights besides the input's.
    backward = 3 * (2 * sum(matrices) * n + 2.5 * attention) + 4 * 2 * adapter * n
    head = 2 * width * config.vocab_size * replies
    assert counted == pytest.approx(forward + backward + 2 * head, rel=0.03)


def test_flops_of_a_patch_are_those_of_its_parts(base: BaseModel) -> None:
    """Reading stops behind the last patched layer, and no output layer runs; the rest is the hypernetwork's."""
    generator = make_generator(base, options={**OPTIONS["associative"], "adapter_rank": 0})
    ids = generator.encoder.tokenize(TEXT)[:60]
    read = flops(lambda: generator.encoder.read([ids]))
    config, n = base.model.config, len(ids) + len(generator.encoder.sink)
    layers = [p.numel() for name, p in base.model.named_parameters() if "layers" in name and p.dim() == 2]
    assert read == pytest.approx(
        2 * sum(layers) * n + 4 * config.num_hidden_layers * n * n * config.hidden_size, rel=0.02
    )
    reading = generator.encoder.open([ids])
    written = generator.hypernet(reading, generator.statistics)  # reads, which is not done again
    made = flops(lambda: generator.hypernet(reading, generator.statistics))
    capped = flops(lambda: generator._capped(written, generator.config.rank))
    assert made > 0 and flops(lambda: generator.factors([ids])) == read + made + capped
    adapted = make_generator(base)
    products = sum(2 * n * 2 * (module.d_in + module.d_out) for module in adapted.hypernet.fixed)
    assert flops(lambda: adapted.factors([ids])) == read + made + capped + products


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a peak of memory")
def test_peak_memory_is_that_of_the_work(base: BaseModel) -> None:
    """Forty MiB held while compiling are seen, as memory above what was there before."""

    class Hungry(METHODS["none"]):  # type: ignore[misc, valid-type]
        held = 0

        def compile(self, *_: Any) -> list[Memory]:
            held = [torch.ones(2**14) for _ in range(16 * self.held)]  # small pieces, which the allocator keeps
            return [Memory()] * int(len(held) > -1)

    item = Item("a", "Text.", (Question("Who?", "I", ("I",)),))
    peaks = {}
    for size in (0, 40):
        method = Hungry(base, None)
        method.held = size
        freed = [torch.ones(2**14) for _ in range(60 * 16)]  # before the work: none of its memory
        del freed
        timing = measure_costs(method, None, [item], 2, Runtime(base))["timing"]
        peaks[size] = timing["peak_mib"]
        assert 0 <= timing["answer_peak_mib"] < 20
    assert 35 < peaks[40] < 80 and peaks[0] < 20


def test_costs_do_not_depend_on_what_was_made_before(base: BaseModel) -> None:
    """A method's conversations about anything are made once, and for all documents."""
    kind, item = METHODS["distillation"], Item("a", TEXT)
    settings = kind.Settings(conversations=16, reply_tokens=4, chats=4, steps=0, rank=4)
    fresh, used = kind(base, settings), kind(base, settings)
    used.compile([Document("b", TEXT[::-1])])
    counted = [measure_costs(method, None, [item], 2, Runtime(base))["compile_flops"] for method in (fresh, used)]
    assert counted[0] == counted[1] > 0


def test_what_methods_share_is_made_once_and_counted_for_each(base: BaseModel) -> None:
    kind, item = METHODS["distillation"], Item("a", TEXT)
    settings = kind.Settings(conversations=16, reply_tokens=4, chats=4, steps=0, rank=4)
    alone, one, other = (kind(base, settings) for _ in range(3))
    one.common = other.common = {}
    made = [flops(lambda m=method: m.compile([Document(item.id, item.text)])) for method in (alone, one, other)]
    assert made[0] == made[1] > made[2]
    counted = [measure_costs(method, None, [item], 2, Runtime(base))["compile_flops"] for method in (alone, other)]
    assert counted[0] == counted[1] > 0
    patches = [method.compile([Document(item.id, item.text)])[0].patch for method in (alone, other)]
    for path, pair in patches[0].factors.items():
        torch.testing.assert_close(pair, patches[1].factors[path])


def test_break_even() -> None:
    assert break_even(100.0, 1.0, 0.0, 11.0) == (pytest.approx(10.0), None)
    assert break_even(100.0, 1.0, 50.0, 11.0) == (pytest.approx(5.0), None)
    assert break_even(100.0, 11.0, 0.0, 11.0) is None  # never cheaper
    assert break_even(10.0, 1.0, 50.0, 11.0) == (0.0, None)  # from the first question on
    assert break_even(10.0, 11.0, 50.0, 11.0) == (0.0, None)
    assert break_even(10.0, 21.0, 50.0, 11.0) == (0.0, 3.0)  # 10 + 21 Q < 50 + 11 Q
    for compiled in (40.0, 45.0, 50.0, 60.0):  # there are only whole questions
        assert break_even(compiled, 21.0, 50.0, 11.0) is None
    assert break_even(10.0, 21.0, 55.0, 11.0) == (0.0, 4.0)
    assert break_even(50.0, 11.0, 50.0, 11.0) is None


def test_long_compilations_are_timed_while_they_are_counted(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    method, item, compiled = METHODS["full"](base, None), Item("a", "Text."), []
    made = method.compile
    monkeypatch.setattr(METHODS["full"], "compile", lambda self, *given: compiled.append(1) or made(*given))
    for limit, times, slow in ((60, 2, False), (0, 1, True)):
        monkeypatch.setattr("hyperlora.compare.costs._LONG", limit)
        compiled.clear()
        timing = measure_costs(method, None, [item], 2, Runtime(base))["timing"]
        assert len(compiled) == times and timed_while_counted(timing) == slow
