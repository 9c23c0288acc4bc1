"""`LLM` and `Chat` as a user of the Python API meets them, on a tiny random model."""

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashmoe import LLM, Chat, FlashMoEError, GenerationStats, SamplingParams
from flashmoe.errors import ConfigError, ContextError
from storage.storage_errors import ReadError

BUDGET = "8G"  # the test process is large; every tiny expert has a slot


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, ram_budget=BUDGET, context=512) as opened:
        yield opened


def answer(chat: Chat, message: str, **sampling: object) -> list[int]:
    return chat.send(message, max_tokens=12, **sampling).token_ids


def after(calls: int) -> Callable[[], bool]:
    """A `cancel` that says yes from the given call on; it is asked once a layer."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_pieces_join_to_the_answer_and_the_stats_add_up(llm: LLM) -> None:
    chat = llm.chat(max_tokens=20)
    pieces = list(chat.stream("the expert"))
    stats = chat.stats
    assert "".join(p.text for p in pieces) == stats.text == chat.messages[-1]["content"]
    assert [p.token_id for p in pieces] == stats.token_ids == [t.token_id for t in stats.tokens]
    assert [p.finish_reason for p in pieces] == [None] * 19 + ["length"]
    assert (stats.decode_tokens, stats.decode_steps) == (20, 19)
    assert stats.hits == sum(t.hits for t in stats.tokens)
    assert stats.misses == sum(t.misses for t in stats.tokens)
    assert stats.expert_bytes_read == sum(t.bytes_read for t in stats.tokens) > 0
    assert 0 < stats.rss_bytes <= stats.peak_rss_bytes
    assert stats.ram_budget_bytes == 8 << 30


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(llm: LLM) -> None:
    answers = [answer(llm.chat(temperature=2.0, seed=seed), "what") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_later_turn_prefills_only_what_is_new(llm: LLM) -> None:
    chat = llm.chat(system="the user")
    answer(chat, "what is the capital of France")
    first = chat.stats
    answer(chat, "and")
    second = chat.stats
    assert first.cached_tokens == 0
    assert second.prompt_tokens == second.cached_tokens + second.prefill_tokens
    # all of the first prompt and answer but its last token, which was sampled and never run
    assert second.cached_tokens == first.prompt_tokens + first.decode_tokens - 1
    assert second.prefill_tokens < first.prompt_tokens


def test_a_reset_chat_answers_like_a_new_one(llm: LLM) -> None:
    chat = llm.chat()
    first = answer(chat, "what is")
    answer(chat, "the longest")
    chat.reset()
    assert answer(chat, "what is") == first
    chat.system = "user system"
    assert chat.messages == [{"role": "system", "content": "user system"}]


def test_two_chats_of_one_model_do_not_mix(llm: LLM) -> None:
    alone = [answer(chat, text) for chat in [llm.chat()] for text in ("what is", "the expert")]
    one, other = llm.chat(), llm.chat(system="system")
    mixed = [answer(one, "what is")]
    answer(other, "something else")
    mixed.append(answer(one, "the expert"))
    assert mixed == alone


def test_cancelling_in_prefill_stops_before_the_first_token_and_the_chat_goes_on(llm: LLM) -> None:
    chat = llm.chat()
    expected = answer(llm.chat(), "what is")
    pieces = list(chat.stream("the expert that was used longest ago", cancel=after(2)))
    assert [(p.text, p.finish_reason) for p in pieces] == [("", "cancelled")]
    assert chat.messages == []
    assert answer(chat, "what is") == expected


def test_cancelling_an_answer_keeps_what_was_said(llm: LLM) -> None:
    chat = llm.chat()
    layers = llm.config.num_hidden_layers
    list(chat.stream("what is", cancel=after(layers * 6 + 1)))
    assert chat.stats.finish_reason == "cancelled"
    assert chat.stats.decode_tokens == 6
    assert chat.messages[-1] == {"role": "assistant", "content": chat.stats.text}
    assert len(answer(chat, "and then")) == 12
    assert chat.stats.cached_tokens > 0


def test_a_keyboard_interrupt_in_the_middle_of_a_layer_leaves_the_chat_usable(llm: LLM) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    chat = llm.chat()
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("what is", cancel=interrupt))
    assert answer(chat, "what is") == answer(llm.chat(), "what is")


def test_an_iterator_given_up_half_way_leaves_the_chat_usable(llm: LLM) -> None:
    chat = llm.chat()
    pieces = chat.stream("what is")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(chat.messages) == 2
    assert len(answer(chat, "more")) == 12


def test_a_full_context_ends_the_answer_and_reset_helps(tiny_model: Path) -> None:
    with LLM(tiny_model, ram_budget=BUDGET, context=64) as llm:
        chat = llm.chat()
        pieces = list(chat.stream("what is"))
        assert pieces[-1].finish_reason == "context"
        assert chat.stats.prompt_tokens + chat.stats.decode_tokens == 64 + 1  # the last one needs no room
        with pytest.raises(ContextError, match="context holds 64"):
            list(chat.stream("more"))
        chat.reset()
        assert len(answer(chat, "what is")) == 12


def test_stop_strings_end_the_answer_and_are_not_part_of_it(llm: LLM) -> None:
    whole = llm.chat().send("what is", max_tokens=40).text
    stop = whole[10:13]
    cut = llm.chat(stop=[stop]).send("what is", max_tokens=40)
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_the_end_of_text_token_ends_the_answer_without_showing(llm: LLM) -> None:
    ids = answer(llm.chat(), "what is")
    llm.tokenizer.eos_token_ids = frozenset({ids[4]})
    done = llm.chat().send("what is")
    assert done.token_ids == ids[: ids.index(ids[4]) + 1]
    assert done.finish_reason == "stop"
    assert done.text == llm.tokenizer.decode(done.token_ids[:-1])


def test_generations_begun_one_after_the_other_go_on_together(llm: LLM) -> None:
    """Each has keys and values of its own, and says what it says alone."""
    alone = [llm.chat().send(text).text for text in ("what is", "the expert")]
    first, second = llm.chat(), llm.chat()
    streams = first.stream("what is"), second.stream("the expert")
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams):
        texts = [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_closing_the_model_in_the_middle_of_an_answer_is_a_clear_error(tiny_model: Path) -> None:
    llm = LLM(tiny_model, ram_budget=BUDGET, context=64)
    pieces = llm.chat().stream("what is")
    next(pieces)
    llm.close()
    with pytest.raises(FlashMoEError, match="closed"):
        next(pieces)


def test_plain_text_is_continued_without_a_template(llm: LLM) -> None:
    stats = GenerationStats()
    pieces = list(llm.stream("the expert that", max_tokens=5, stats=stats))
    assert stats.prompt_tokens == len(llm.tokenizer.encode("the expert that"))
    assert "".join(p.text for p in pieces) == llm.generate("the expert that", max_tokens=5).text


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"colour": 1}])
def test_a_bad_sampling_option_is_refused_before_anything_runs(llm: LLM, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        llm.chat(**bad)


def test_sampling_defaults_come_from_generation_config(llm: LLM) -> None:
    llm.generation_config = {"do_sample": True, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2}
    assert llm.sampling_params({"top_k": 3}) == SamplingParams(
        temperature=0.7, top_k=3, repetition_penalty=1.2
    )


def test_a_bad_default_of_the_model_names_its_file_and_can_be_overridden(llm: LLM) -> None:
    llm.generation_config = {"do_sample": True, "top_k": -1}
    with pytest.raises(ConfigError, match=r"generation_config\.json.*top_k"):
        llm.chat()
    assert llm.sampling_params({"top_k": 5}).top_k == 5


def test_a_conversation_is_saved_as_json(llm: LLM, tmp_path: Path) -> None:
    import json

    chat = llm.chat(system="the user")
    answer(chat, "what")
    chat.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text("utf-8")) == {"messages": chat.messages}


def test_a_closed_model_says_so(tiny_model: Path) -> None:
    llm = LLM(tiny_model, ram_budget=BUDGET, context=64)
    llm.close()
    llm.close()
    with pytest.raises(FlashMoEError, match="closed"):
        llm.generate("what")


@pytest.mark.parametrize("reader", [pytest.param("direct", marks=pytest.mark.drive), "buffered", "mmap"])
def test_a_drive_error_in_the_middle_of_an_answer_is_an_error_and_the_chat_survives(
    tiny_model: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_model, ram_budget=BUDGET, reader=reader, context=512) as llm:
        expected = answer(llm.chat(), "what is")
        llm.expert_cache.evict_all()
        drive = llm.expert_cache._reader
        real, calls = drive.read_run, iter(range(1000))

        def failing(*args: object, **kwargs: object) -> int:
            if next(calls) > 12:
                raise ReadError("model.safetensors: input/output error at offset 4096")
            return real(*args, **kwargs)  # type: ignore[arg-type]

        chat = llm.chat()
        with monkeypatch.context() as patch:
            patch.setattr(drive, "read_run", failing)
            with pytest.raises(ReadError, match="input/output error"):
                answer(chat, "what is")
        chat.reset()
        assert answer(chat, "what is") == expected


CONVERSATION = [{"role": "user", "content": "what is"}]
MANY = ["the expert", CONVERSATION, "user system", "what is the capital", CONVERSATION]


def test_many_prompts_are_answered_together_in_their_order(llm: LLM) -> None:
    alone = [llm.generate([prompt], max_tokens=7, progress=False)[0] for prompt in MANY]
    together = llm.generate(MANY, max_tokens=7)
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]
    assert {g.finish_reason for g in together} == {"length"}
    assert llm.generate("the expert", max_tokens=7).token_ids == alone[0].token_ids
    assert llm.chat().send("what is", max_tokens=7).token_ids == alone[1].token_ids


def test_more_prompts_than_may_wait_are_no_error(llm: LLM) -> None:
    llm.scheduler.most_waiting = 1
    assert len(llm.generate(["the"] * 20, max_tokens=2)) == 20


def test_one_prompt_that_cannot_run_stops_the_batch_before_it_begins(llm: LLM) -> None:
    with pytest.raises(ContextError, match="context holds 512"):
        llm.generate(["the", "the " * 600], max_tokens=2)
    assert not llm.scheduler.waiting and not llm.scheduler.running


def test_asyncio_gets_the_same_answers_and_a_chat_goes_on(llm: LLM) -> None:
    expected = llm.generate(MANY, max_tokens=7)
    first, second = llm.chat(max_tokens=7), llm.chat(max_tokens=7)
    turns = [first.send("what is").text, first.send("the expert").text]

    async def main() -> None:
        results = await llm.agenerate(MANY, max_tokens=7)
        assert isinstance(results, list)
        assert [g.token_ids for g in results] == [g.token_ids for g in expected]
        assert "".join([p.text async for p in second.astream("what is")]) == turns[0]
        assert (await second.asend("the expert")).text == turns[1]
        assert second.stats.cached_tokens > 0 and second.stats.peak_rss_bytes > 0
        with pytest.raises(ContextError):
            await llm.agenerate("the " * 600)

    asyncio.run(main())


def test_streams_of_many_threads_have_every_piece_whoever_computes(llm: LLM) -> None:
    expected = llm.generate("the expert", max_tokens=3).text
    found: list[tuple[str, str | None]] = []

    def client() -> None:
        for _ in range(25):
            pieces = list(llm.stream("the expert", max_tokens=3))
            found.append(("".join(p.text for p in pieces), pieces[-1].finish_reason))

    for own_thread in (True, False):
        if own_thread:
            llm.scheduler.start()
        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        llm.scheduler.stop()
    assert found == [(expected, "length")] * 200


def test_nothing_is_changed_under_a_generation_that_runs(llm: LLM) -> None:
    pieces = llm.stream("the expert", max_tokens=9)
    next(pieces)
    for change in (lambda: llm.use_policy("lfu"), llm.reset):
        with pytest.raises(FlashMoEError, match="1 generations run"):
            change()
    assert len(list(pieces)) == 8
    llm.use_policy("lfu")
    llm.reset()


def test_an_asynchronous_answer_that_nobody_takes_is_cancelled(llm: LLM) -> None:
    async def main() -> None:
        pieces = llm.astream("the expert", max_tokens=400)
        await anext(pieces)
        await pieces.aclose()
        while llm.scheduler.running:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert llm.scheduler.totals.cancelled == 1


def test_a_conversation_goes_on_from_its_session_cache(tiny_model: Path, tmp_path: Path) -> None:
    options = {"ram_budget": BUDGET, "context": 512, "session_cache": tmp_path / "sessions"}
    system = "the expert that was used longest ago leaves first " * 8
    with LLM(tiny_model, **options) as llm:
        first = llm.chat(system=system, max_tokens=9).send("what is")
        assert first.stats.cached_tokens == 0
    with LLM(tiny_model, **options) as llm:
        again = llm.chat(system=system, max_tokens=9).send("what is")
        other = llm.chat(system=system, max_tokens=9).send("the capital")
    assert again.token_ids == first.token_ids
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert 64 < other.stats.cached_tokens < other.stats.prompt_tokens - 1
    with LLM(tiny_model, ram_budget=BUDGET, context=512) as llm:
        assert llm.chat(system=system, max_tokens=9).send("the capital").token_ids == other.token_ids


def test_closing_frees_the_weights_without_a_collector(tiny_model: Path) -> None:
    """A program that opens one model after the other must not hold the first one's."""
    llm = LLM(tiny_model, ram_budget=BUDGET, context=64)
    llm.generate(["the expert"] * 3, max_tokens=3)
    decoder = llm.engine.decoder
    held = [weakref.ref(decoder), weakref.ref(llm._weights.norm), weakref.ref(decoder.kv_cache)]
    del decoder
    gc.disable()
    try:
        llm.close()
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()
    llm.close()
