"""The engine's slots: what a row gives is its own, whatever its neighbours; speculation; caches in 8 bits; costs."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import CONFIG, EIGHT_HEADS, prompts_of, sharded, tokens_of
from variants import VARIANTS, random_model

from neox_jax import engine as engine_module
from neox_jax.engine import (
    BLOCK_STEPS,
    MAX_STOP_IDS,
    Engine,
    Request,
    as_arrays,
    extend,
    forward_prompts,
    length_bucket,
    next_token_logits,
)
from neox_jax.errors import InputError
from neox_jax.generation import generate
from neox_jax.kv_cache import KVCache
from neox_jax.model import abstract_model
from neox_jax.sampling import SamplingParams
from neox_jax.sharding import make_mesh
from neox_jax.tree import num_bytes

GREEDY = SamplingParams(temperature=0)
LONG = dataclasses.replace(CONFIG, max_position_embeddings=256)


@pytest.fixture(scope="module")
def model():
    return random_model(LONG)


def tokens_in(scores, row: int) -> list[int]:
    return [token for token in np.asarray(scores.tokens)[row].tolist() if token != -1]


def decode(engine: Engine, row: int, first, blocks: int) -> list[int]:
    """A slot's tokens: the first one, and those of so many blocks."""
    return [*first, *(token for _ in range(blocks) for token in tokens_in(engine.decode_block(), row))]


# ---- right


@pytest.mark.parametrize(("name", "int8_cache"), [("pythia", False), ("redpajama", True)])
def test_cached_decoding_equals_the_full_forward(name, int8_cache):
    """Logits at every position of ragged rows, one and three tokens at a time, in slots that were used before."""
    model = random_model(VARIANTS[name])
    config, total, slots = model.config, 30, np.asarray([2, 0, 3, 1])
    lengths = np.asarray([5, 1, 17, 16])
    tokens = np.asarray(prompts_of(config, [total] * 4))
    wanted = np.asarray(model(jnp.asarray(tokens)))
    prompts = np.where(np.arange(32) < lengths[:, None], np.pad(tokens, ((0, 0), (0, 2))), 7)
    x_BTD, keys_values = jax.jit(forward_prompts)(model, prompts)
    rows, tolerance = np.arange(4), 0.1 if int8_cache else 1e-4
    last_BD = x_BTD[rows, lengths - 1]
    np.testing.assert_allclose(next_token_logits(model, last_BD), wanted[rows, lengths - 1], atol=1e-4)

    sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads, "head_dim": config.head_dim}
    cache = KVCache.zeros(**sizes, batch=4, length=40, dtype=jnp.int8 if int8_cache else jnp.float32)
    insert = jax.jit(KVCache.insert)
    cache = insert(cache, *(x + 1 for x in keys_values), lengths, slots)  # what was there before is written over
    cache = insert(cache, *keys_values, lengths, slots)
    tokens, wanted, lengths = (x[np.argsort(slots)] for x in (tokens, wanted, lengths))

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, fed, num_new):
        x_BTD, keys_values = extend(model, cache, fed)
        logits = jax.vmap(functools.partial(next_token_logits, model))(x_BTD)
        return logits, cache.append(*keys_values, num_new)

    for size in (1, 3, 1, 3, 3):  # of three only the first two are kept
        fed = np.stack([row[at : at + size] for row, at in zip(tokens, lengths, strict=True)])
        kept = np.minimum(2, size) * (lengths + size < total)
        logits, cache = step(cache, fed, kept)
        for i in range(size):
            np.testing.assert_allclose(logits[:, i], wanted[rows, lengths + i], atol=tolerance)
        lengths = lengths + kept
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_slots_are_filled_and_emptied_at_any_time(model):
    """Rows that come and go give what each gives alone: in any slot, beside any other, one prefill for several."""
    prompts = prompts_of()
    sampled = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    requests = [
        Request(40, GREEDY), Request(33, sampled, (1, 2, 3)), Request(40, sampled, (4, 5, 6)), Request(50, GREEDY),
    ]  # fmt: skip

    def alone(prompt, request):
        engine = Engine(model, num_slots=1, max_length=96)
        first = engine.insert(engine.prefill([prompt]), [0], [request])
        return decode(engine, 0, tokens_in(first, 0), 4)[: request.max_new_tokens]

    wanted = [alone(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
    engine = Engine(model, num_slots=4, max_length=96)
    got = {row: [] for row in range(4)}

    def insert(rows, slots):
        prefilled = engine.prefill([prompts[row] for row in rows][::-1])
        order = [len(rows) - 1 - i for i in range(len(rows))]
        first = engine.insert(prefilled, slots, [requests[row] for row in rows], rows=order)
        for i, row in enumerate(rows):
            got[row] += tokens_in(first, i)

    def block(slots):
        scores = engine.decode_block()
        for row, slot in slots.items():
            got[row] += tokens_in(scores, slot)

    insert([0], [3])
    block({0: 3})
    insert([1, 2], [1, 0])
    block({0: 3, 1: 1, 2: 0})
    engine.free([3])
    insert([3], [3])  # before it has been told that the slot is free
    for _ in range(3):
        block({1: 1, 2: 0, 3: 3})
    assert got[0] == wanted[0][: len(got[0])]
    assert len(got[0]) == 1 + 2 * BLOCK_STEPS
    assert [got[row] for row in (1, 2)] == wanted[1:3]
    assert got[3] == wanted[3][: len(got[3])]
    assert len(got[3]) == 1 + 3 * BLOCK_STEPS


def test_more_prompts_than_slots(model):
    """Three slots for eleven rows of three lengths: each as in a batch of all, in order, and `done` as each ends."""
    prompts = prompts_of(lengths=(5, 1, 17, 9, 5, 33, 5, 2, 17, 1, 40))
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": 3}
    ended = []
    few = generate(model, None, prompts, batch_size=3, done=lambda i, one: ended.append((i, one)), **options)
    assert tokens_of(few) == tokens_of(generate(model, None, prompts, **options))
    assert dict(ended) == dict(enumerate(few))
    assert len({len(one.tokens) for one in few}) > 1  # some reach the end-of-text id and make room


# ---- requests


def test_each_slot_has_its_own_request(model):
    """Stop ids, biases, penalties, minimum and maximum in neighbouring rows, by one program."""
    prompt = prompts_of()[0]
    (greedy,) = tokens_of(generate(model, None, [prompt], max_new_tokens=24, temperature=0, ignore_eos=True))
    stop = greedy[3]
    requests = [
        Request(24, GREEDY),
        Request(24, GREEDY, stop_ids=[stop]),
        Request(24, GREEDY, stop_ids=[stop], min_tokens=12),
        Request(24, GREEDY, biases={greedy[0]: -1e4, greedy[1]: -1e4}),
        Request(24, GREEDY, biases={7: 1e4}),
        Request(7, GREEDY),
        Request(24, dataclasses.replace(GREEDY, presence_penalty=1e4)),
        Request(24, dataclasses.replace(GREEDY, repetition_penalty=1e4)),
    ]
    engine = Engine(model, num_slots=8, max_length=64)
    first = engine.insert(engine.prefill([prompt]), [0], requests[:1])
    rows = [tokens_in(first, 0)]
    prefilled = engine.prefill([prompt] * 8)
    first = engine.insert(prefilled, range(8), requests)
    rows = [tokens_in(first, i) for i in range(8)]
    for _ in range(2):
        scores = engine.decode_block()
        rows = [row + tokens_in(scores, i) for i, row in enumerate(rows)]
    assert rows[0] == greedy
    assert rows[1] == greedy[: greedy.index(stop) + 1]
    assert len(rows[2]) >= 13
    assert stop not in rows[2][:12]
    assert not {greedy[0], greedy[1]} & set(rows[3])
    assert rows[4] == [7] * 24
    assert rows[5] == greedy[:7]
    assert len(set(rows[6])) == 24
    assert not set(rows[7][:20]) & set(prompt)


def test_log_probabilities_of_prompts_and_likeliest_tokens(model):
    prompts = prompts_of(lengths=(5, 1, 17, 200))
    options = {"max_new_tokens": 5, "temperature": 0.7, "ignore_eos": True, "top_logprobs": 4, "prompt_logprobs": True}
    for prompt, one in zip(prompts, generate(model, None, prompts, **options), strict=True):
        whole = prompt + one.tokens
        logprobs = np.asarray(jax.nn.log_softmax(model(jnp.asarray([whole]))))[0]
        chosen = [None, *(logprobs[i - 1, token] for i, token in enumerate(whole) if i)]
        assert one.prompt_logprobs[0] is one.prompt_top_logprobs[0] is None
        given = [*one.prompt_logprobs, *one.logprobs]
        assert len(given) == len(chosen)
        np.testing.assert_allclose(given[1:], chosen[1:], atol=1e-4)
        tops = [*one.prompt_top_logprobs, *one.top_logprobs]
        for i in range(1, len(whole)):
            assert list(tops[i].values()) == sorted(tops[i].values(), reverse=True)
            np.testing.assert_allclose(list(tops[i].values()), np.sort(logprobs[i - 1])[:-5:-1], atol=1e-4)
            np.testing.assert_allclose(list(tops[i].values()), logprobs[i - 1, list(tops[i])], atol=1e-4)
    plain = generate(model, None, prompts, max_new_tokens=5, temperature=0.7, ignore_eos=True)
    assert all(one.top_logprobs is one.prompt_logprobs is None for one in plain)


def test_refusals(model):
    with pytest.raises(InputError, match="33 stop ids are too many; at most 32"):
        as_arrays([Request(1, stop_ids=range(MAX_STOP_IDS + 1))])
    with pytest.raises(InputError, match="max_length is 257; wanted 1 to 256"):
        Engine(model, num_slots=1, max_length=257)
    with pytest.raises(InputError, match="a prompt has 64 tokens, and max_length is 64; it must be shorter"):
        Engine(model, num_slots=1, max_length=64).prefill([[1] * 64])
    with pytest.raises(InputError, match="num_drafted is 0; with a model that drafts"):
        Engine(model, num_slots=1, max_length=64, draft=model)


@pytest.mark.parametrize("num_drafted", [0, 3])
def test_a_request_ends_where_its_slot_does(model, num_drafted):
    engine = Engine(model, num_slots=2, max_length=32, num_drafted=num_drafted)
    prompt = prompts_of()[0]
    first = engine.insert(engine.prefill([prompt]), [1], [Request(1000, GREEDY)])
    got = decode(engine, 1, tokens_in(first, 0), 3)
    wanted = generate(model, None, [prompt], max_new_tokens=27, temperature=0, ignore_eos=True)
    assert [got] == tokens_of(wanted)


# ---- speculation


@pytest.mark.parametrize(
    ("drafting", "options"),
    [
        ("lookup", {"temperature": 0}),
        ("lookup", {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2}),
        ("same", {"temperature": 0.9}),
        ("other", {"temperature": 0}),
        ("other", {"temperature": 0.9, "top_k": 20, "presence_penalty": 0.3}),
    ],
)
def test_speculation_changes_no_token(model, drafting, options):
    """Greedy and sampled; with stops, limits and minimum lengths; a draft that is right, often wrong, or a lookup."""
    drafts = {"lookup": None, "same": model, "other": random_model(dataclasses.replace(LONG, vocab_size=112), seed=9)}
    prompts = [*prompts_of(), [5, 6, 7] * 6]
    options = {"max_new_tokens": 40, "seed": 4, "min_tokens": 5, **options}
    wanted = generate(model, None, prompts, **options)
    got = generate(model, None, prompts, draft=drafts[drafting], num_drafted=3, **options)
    assert tokens_of(got) == tokens_of(wanted)
    assert [one.finish_reason for one in got] == [one.finish_reason for one in wanted]
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_right_draft_saves_steps(model):
    """A model that drafts for itself is always right: four tokens a step; one that looks up, in a text that repeats."""

    def blocks(prompt, **options):
        engine = Engine(model, num_slots=1, max_length=128, block_steps=1, **options)
        engine.insert(engine.prefill([prompt]), [0], [Request(41, GREEDY, biases={3: 1e4})])
        counts = []
        while len(tokens := tokens_in(engine.decode_block(), 0)):
            counts.append(len(tokens))
        return counts

    prompt = prompts_of()[0]
    assert blocks(prompt) == [1] * 40
    assert blocks(prompt, draft=model, num_drafted=3) == [4] * 10
    assert len(blocks(prompt, num_drafted=3)) < 16  # the same token each time, from the bias


def test_a_draft_of_larger_vocabulary_noise_agrees():
    """The same noise for the same ids, however many rows the table has: what sampled drafts are right by."""
    key = jax.random.key(3)
    short, long = (jax.random.gumbel(key, (size,)) for size in (96, 128))
    np.testing.assert_array_equal(short, long[:96])


# ---- caches in 8 bits


def test_an_int8_cache_is_close(model):
    prompts = prompts_of()
    options = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    exact, close = (generate(model, None, prompts, int8_cache=flag, **options) for flag in (False, True))
    for prompt, one in zip(prompts, close, strict=True):
        logits = np.asarray(jax.nn.log_softmax(model(jnp.asarray([prompt + one.tokens]))))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logprobs, logits[np.arange(24), one.tokens], atol=0.05)
    assert exact != close
    engine = Engine(model, num_slots=4, max_length=64, int8_cache=True)
    sizes = {part.dtype.name: part.nbytes for part in (engine._slots.cache.keys, engine._slots.cache.key_scales)}
    assert sizes["int8"] == sizes["float32"] * CONFIG.head_dim // 4


# ---- meshes


@pytest.mark.parametrize(
    ("axes", "options"),
    [({"model": 8}, {"int8_cache": True}), ({"data": 2, "fsdp": 2, "model": 2}, {"num_drafted": 2})],
)
def test_a_mesh_gives_the_same_tokens(axes, options):
    """More rows than slots, in rows that other devices hold."""
    mesh = make_mesh(**axes)
    prompts = prompts_of(EIGHT_HEADS, (5, 1, 17, 4, 5, 6, 7))
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 30, "batch_size": 4, **options}
    wanted = generate(random_model(EIGHT_HEADS), None, prompts, **options)
    got = generate(sharded(EIGHT_HEADS, mesh), None, prompts, **options)
    assert tokens_of(got) == tokens_of(wanted)
    np.testing.assert_allclose(got[2].logprobs, wanted[2].logprobs, atol=1e-4)


# ---- costs


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 16), (16, 16), (17, 32), (32, 32), (1000, 1024), (1025, 2048), (1400, 1500)]
)
def test_length_buckets(length, bucket):
    assert length_bucket(length, 1500 if length == 1400 else 2048) == bucket


@contextlib.contextmanager
def counting_compilations():
    compiled = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
        before = len(compiled)
        jax.jit(lambda x: x + 1)(0)
        assert len(compiled) > before  # the counter counts
        del compiled[before:]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("axes", [None, {"data": 2, "model": 4}])
def test_a_second_call_compiles_nothing(axes):
    """Other prompts, seeds, parameters, stops and numbers of tokens within the same buckets; several blocks each."""
    model = sharded(EIGHT_HEADS, make_mesh(**axes)) if axes else random_model(EIGHT_HEADS, seed=4)
    generate(model, None, prompts_of(EIGHT_HEADS, (5, 9)), max_new_tokens=3 * BLOCK_STEPS - 2, ignore_eos=True)
    with counting_compilations() as compiled:
        prompts = prompts_of(EIGHT_HEADS, (11, 16), seed=1)
        generate(model, None, prompts, max_new_tokens=30, temperature=0, stop=[3, 4], logit_bias={3: 1.5})
        generate(model, None, prompts, max_new_tokens=41, seed=9, temperature=0.7, top_p=0.9, stop=5, ignore_eos=True)
        generate(model, None, prompts, max_new_tokens=25, top_k=5, min_p=0.1, repetition_penalty=1.3, min_tokens=3)
        generate(model, None, prompts, max_new_tokens=25, presence_penalty=0.5, frequency_penalty=0.5)
    assert compiled == []


def test_nothing_compiles_after_warm_up(model):
    engine = Engine(model, num_slots=4, max_length=70)
    engine.warm_up()
    random = np.random.default_rng(0)
    with counting_compilations() as compiled:
        for i, length in enumerate([1, 2, 15, 16, 17, 31, 33, 64, 69]):
            params = SamplingParams(temperature=i / 4, top_k=i, top_p=1 - i / 20, presence_penalty=i)
            request = Request(70 - length, params, (i, i, i), stop_ids=range(i), biases=dict.fromkeys(range(i), 1.0))
            prompt = random.integers(0, CONFIG.vocab_size, length).tolist()
            engine.insert(engine.prefill([prompt]), [i % 4], [request])
            engine.decode_block()
            engine.free([(i + 1) % 4])
    assert compiled == []


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (None, {}),
        ({"model": 8}, {"int8_cache": True}),
        ({"data": 2, "fsdp": 2, "model": 2}, {"num_drafted": 3}),
    ],
)
def test_a_block_copies_no_cache(axes, options):
    """The compiled block and the insertion keep the cache in place: donated, and no temporary near its size."""
    batch, length = 8, 2048
    config = dataclasses.replace(EIGHT_HEADS, num_hidden_layers=6, max_position_embeddings=length)
    mesh = make_mesh(**axes) if axes else None
    model = abstract_model(config, mesh=mesh)
    num_drafted = options.get("num_drafted", 0)
    sizes = {"batch": batch, "length": length, "int8_cache": options.get("int8_cache", False)}
    empty = engine_module._empty_slots.lower((model, None), np.int32(96), **sizes)
    slots = empty.out_info
    if mesh is not None:
        shardings = empty.compile().output_shardings
        slots = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), slots, shardings)
    options = {"block_steps": 16, "top": 0, "num_drafted": num_drafted}
    block = engine_module._decode_block.lower((model, None), slots, np.zeros(batch, bool), **options).compile()
    prompts = np.zeros((batch, 16), np.int32), np.ones(batch, np.int32)
    prefill = engine_module._prefill.lower((model, None), *prompts, top=None)
    prefilled = prefill.out_info
    if mesh is not None:
        at = prefill.compile().output_shardings
        prefilled = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), prefilled, at)
    places, wanted = np.zeros((2, batch), np.int32), as_arrays([Request(1)] * batch)
    insert = engine_module._insert.lower(
        model, slots, prefilled, places, wanted, top=0, num_drafted=num_drafted
    ).compile()
    cache_bytes = num_bytes(slots.cache.layers) // (mesh.size if mesh else 1)
    for compiled in (block, insert):
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 2
    after = block.output_shardings[0].cache.keys
    assert mesh is None or after.shard_shape(slots.cache.keys.shape)[1:3] == (
        batch // (axes.get("data", 1) * axes.get("fsdp", 1)),
        8 // axes["model"],
    )
