"""What the model itself answers with the document in the prompt: the replies that a good memory makes likely."""

from collections.abc import Sequence

from hyperlora.compare.cache import Cache, digest
from hyperlora.data.items import Item
from hyperlora.methods.contract import Document
from hyperlora.methods.full import Full
from hyperlora.runtime import Runtime


def teacher_replies(
    items: Sequence[Item], max_new_tokens: int, runtime: Runtime, cache: Cache
) -> list[list[list[int]]]:
    """Greedy replies as token ids, for every item and each of its questions; kept in `cache`."""
    base = runtime.base
    same = [base.identity, str(base.model.dtype), max_new_tokens]
    keys = [digest("teacher", *same, item.text, [question.text for question in item.questions]) for item in items]
    missing = [number for number, key in enumerate(keys) if key not in cache]
    if missing:
        memories = Full(base, Full.Settings()).compile([Document(items[n].id, items[n].text) for n in missing])
        asked = [[runtime.question(i, q.text) for q in items[n].questions] for i, n in enumerate(missing)]
        replies = iter(runtime.replies(memories, [prompt for group in asked for prompt in group], max_new_tokens))
        cache.add({keys[n]: [next(replies) for _ in group] for n, group in zip(missing, asked, strict=True)})
    return [cache[key] for key in keys]
