"""Members turned into what temper reads: a small GGUF into a plain folder, tables into records."""

from __future__ import annotations

import bz2
import json

import numpy as np
import pytest

from temper.data import assets
from temper.data.conversions import convert
from temper.data.loading import load_data

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "th", "the"]


def write_gguf(path):
    """A random two-layer Llama with a character vocabulary; gives its token embeddings."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_k": (kv, WIDTH), f"blk.{i}.attn_v": (kv, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH), f"blk.{i}.ffn_gate": (INNER, WIDTH),
            f"blk.{i}.ffn_up": (INNER, WIDTH), f"blk.{i}.ffn_down": (WIDTH, INNER),
            f"blk.{i}.attn_norm": (WIDTH,), f"blk.{i}.ffn_norm": (WIDTH,),
        }  # fmt: skip
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_becomes_a_plain_folder_with_the_same_weights(tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    tensors = write_gguf(tmp_path / "model.gguf")
    convert("gguf", tmp_path)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "model.gguf").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], tensors["token_embd"])
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for ours, theirs in [
            ("self_attn.v_proj", "attn_v"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
        ]:
            np.testing.assert_array_equal(state[f"{layer}{ours}.weight"], tensors[f"blk.{i}.{theirs}"])
        # The two formats order the rows of a head differently for the rotation.
        rows = tensors[f"blk.{i}.attn_q"].reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2)
        np.testing.assert_array_equal(state[f"{layer}self_attn.q_proj.weight"], rows.reshape(WIDTH, WIDTH))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the t").input_ids == [TOKENS.index("the"), TOKENS.index("Ġ"), TOKENS.index("t")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_reviews_of_a_film_stay_in_one_part(tmp_path):
    lines = ["category,text,movie_name,has_plot_and_reviews", "plot,what happens,film0,True"]
    lines += [f"{'fresh' if i % 3 else 'rotten'},text {i},film{i % 20},False" for i in range(100)]
    (tmp_path / "reviews.csv.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    convert("rotten-tomatoes", tmp_path)
    train, test = (load_data(str(tmp_path / f"{part}.jsonl"), "Labelled").rows for part in ("train", "test"))
    assert len(train) + len(test) == 100
    films = [{r.extra["film"] for r in part} for part in (train, test)]
    assert films[0].isdisjoint(films[1])
    assert len(films[0] | films[1]) == 20
    assert {r.label for r in train} == {"fresh", "rotten"}
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl"] == []


def test_chats_become_dialogues(tmp_path):
    def line(who, text):
        return {"sender": who, "text": text}

    rated = {"witty": 1, "upbeat": 2, "interesting": 3}
    conversations = {
        "c1": {
            "messages": [[line("x", "a"), line("x", "b")], [line("y", "c")], [line("x", " ")], [line("y", "d")]],
            "prompt": "topic", "ratings": rated,
        },
        "c2": {"messages": [[line("x", "nobody answers")]]},
        "c3": {"messages": [[line("y", "e")], [line("x", "f")]]},
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(conversations))
    convert("chitchat", tmp_path)
    first, second = load_data(str(tmp_path / "train.jsonl")).rows
    assert [(m.role, m.content) for m in first.messages] == [("user", "a\nb"), ("assistant", "c\nd")]
    assert (first.id, first.extra) == ("c1", {"topic": "topic", **rated})
    assert (second.id, second.extra) == ("c3", {})


def test_refusal_labels(tmp_path):
    header = "objective,assistant_response,human_score,data_type\n"
    (tmp_path / "refusal.csv").write_text(
        "# version\n" + header + '"ask","I\ncannot",1,text\nask,Sure,0,text\n'
    )
    (tmp_path / "refusal_extra.csv").write_text("# a\n# b\n" + header + "ask,No,1,text\n")
    convert("refusal-labels", tmp_path)
    test = load_data(str(tmp_path / "test.jsonl")).rows
    assert [(r.text, r.label, r.extra) for r in test] == [
        ("I\ncannot", 1, {"prompt": "ask"}),
        ("Sure", 0, {"prompt": "ask"}),
    ]
    assert len(load_data(str(tmp_path / "extra.jsonl")).rows) == 1


def test_parallel_questions(tmp_path):
    document = """fewshot_config:
  samples:
  - input_choice_list: {B: '1 &lt; 2', A: 7}
    input_correct_responses: [B]
    input_question: Which?
process_docs: !function utils.process
task_alias: %s
"""
    (tmp_path / "de.yaml").write_text(document % "maths" + document % "logic")
    convert("mmlu-parallel", tmp_path)
    rows = load_data(str(tmp_path / "de.jsonl")).rows
    assert [r.id for r in rows] == ["maths-1", "logic-1"]
    assert (rows[0].choices, rows[0].answer, rows[0].extra) == (("7", "1 < 2"), 1, {"subject": "maths"})


def cached(name):
    if not assets.is_cached(name):
        pytest.skip(f"temper fetch {name}")
    return assets.fetch(name)


def test_the_real_model_says_paris():
    folder = cached("smollm2-135m")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert [tokenizer(text).input_ids for text in (" sure", " unsure", "Sorry")] == [[2090], [18661], [37388]]
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
    assert logits.softmax(-1).max() == pytest.approx(0.7725, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rotten-tomatoes", {"test": 2429, "train": 10379}),
        ("chitchat", {"train": 4017}),
        ("20newsgroups", {"test": 7528, "train": 11293}),
        ("mnist-5k", {"test": 1000, "train": 4000}),
        ("fashion-mnist", {"test": 10_000, "train": 60_000}),
        ("refusal-labels", {"extra": 64, "test": 105}),
        ("mmlu-parallel", dict.fromkeys(("de", "es", "fr", "hi", "it", "pt", "th"), 285)),
    ],
)
def test_real_sets_have_their_counts(name, sizes):
    cached(name)
    assert {part: len(rows) for part, rows in load_data(f"asset:{name}").items()} == sizes
