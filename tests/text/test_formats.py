"""The files that tokenizers come in, against transformers reading the same folders."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hard_strings import hard_strings
from text_corpus import KINDS, SENTENCES, trained, tree
from transformers import AutoTokenizer, LlamaTokenizer, T5Tokenizer, XLMRobertaTokenizer, logging
from transformers.convert_slow_tokenizer import XLMRobertaConverter
from wire_format import ENDS, sentencepiece_file

from headway.errors import InputError
from headway.text import Tokenizer
from headway.text.formats import chat_template
from headway.text.sentencepiece import read_model

logging.set_verbosity_error()
NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@functools.cache
def byte_level_files() -> dict[str, str]:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(SENTENCES, 1500, special_tokens=NAMES, show_progress=False)
    model = json.loads(made._tokenizer.to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "#version: 0.2\n" + merges}


@functools.cache
def word_piece_files(lowercase: bool) -> dict[str, str]:
    made = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    made.train_from_iterator(SENTENCES, 1200, show_progress=False)
    vocab = made.get_vocab()
    return {"vocab.txt": "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get))}


def folder(path: Path, files: dict[str, Any], beside: dict[str, Any] | None = None, **more: Any) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, value in {"tokenizer_config": beside, **more}.items():
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    return path


def tool(number: int, content: str, special: bool) -> dict[str, Any]:
    return {str(number): {"content": content, "special": special, **FLAGS}}


OPT = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
MASK = {"mask_token": {"content": "<mask>", **FLAGS, "lstrip": True}}
SAME = [
    # files, tokenizer_config.json, other JSON files, ids before and behind
    ("bytes", {"tokenizer_class": "GPT2Tokenizer"}, {}, [], []),
    ("bytes", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, {}, [], []),
    ("bytes", {"tokenizer_class": "GPT2Tokenizer", **OPT}, {}, ["</s>"], []),
    ("bytes", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, "add_eos_token": True}, {}, [], [NAMES[5]]),
    ("bytes", {"tokenizer_class": "RobertaTokenizer"}, {"special_tokens_map": MASK}, ["<s>"], ["</s>"]),
    ("bytes", {}, {"config": {"model_type": "roberta"}}, ["<s>"], ["</s>"]),
    ("bytes", {"tokenizer_class": "BartTokenizer", "add_prefix_space": True}, {}, ["<s>"], ["</s>"]),
    (
        "bytes",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": tool(1500, "<|im_start|>", True) | tool(1501, "<tool>", False),
        },
        {},
        [],
        [],
    ),
    ("words", {"tokenizer_class": "BertTokenizer"}, {}, ["[CLS]"], ["[SEP]"]),
    ("words", {"tokenizer_class": "DistilBertTokenizer", "strip_accents": False}, {}, ["[CLS]"], ["[SEP]"]),
    ("cased", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}, {}, ["[CLS]"], ["[SEP]"]),
    ("words", {"tokenizer_class": "BertTokenizerFast", "tokenize_chinese_chars": False}, {}, ["[CLS]"], ["[SEP]"]),
]


@pytest.mark.parametrize("case", range(len(SAME)), ids=lambda number: str(SAME[number][:2])[:60])
def test_equals_transformers(case, tmp_path):
    kind, config, more, before, behind = SAME[case]
    files = byte_level_files() if kind == "bytes" else word_piece_files(kind == "words")
    path = folder(tmp_path / "model", files, config, **more)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert [ours.token(number) for number in ours.prefix_ids] == before
    assert [ours.token(number) for number in ours.suffix_ids] == behind
    names = {*theirs.all_special_tokens, *NAMES, "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[PAD]", "<|im_start|>"}
    # Typed names of control tokens are text for Headway and control for transformers.
    texts = [text for text in hard_strings()[case % 4 :: 4] if not any(name in text for name in names)]
    texts += [f"a <tool> {text}<tool>" for text in texts[::20]]
    assert [ours.encode_input(text) for text in texts] == theirs(texts).input_ids
    assert len(texts) > 5000 and ours.vocab_size == len(theirs)
    for role in ("pad", "unk", "mask"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    if kind == "bytes":
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    again = Tokenizer.load(ours.save(tmp_path / "again"))
    assert (
        again.hash == ours.hash
        and again.prefix_ids == ours.prefix_ids
        and again.encode(texts[5]) == ours.encode(texts[5])
    )


def sentencepiece_bytes(kind: str, **options: Any) -> bytes:
    from test_sentencepiece import trained_model

    return trained_model(kind, symbols=False, **options)


def test_t5_llama_and_xlm_r(tmp_path):
    """Ids of ordinary sentences, numbering and template; transformers itself would need protobuf to read .model."""
    pytest.importorskip("sentencepiece")
    texts = [
        line for text in SENTENCES for line in text.split("\n") if line.strip() == line and "  " not in line and line
    ][:300]
    data = sentencepiece_bytes("unigram", rule="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    pieces = [(piece.text, piece.score) for piece in read_model(data, "m").pieces]
    ours = Tokenizer.load(folder(tmp_path / "t5", {"spiece.model": data}, {"tokenizer_class": "T5Tokenizer"}))
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    theirs = T5Tokenizer(vocab=pieces + extra, extra_ids=100)
    assert [ours.encode_input(text) for text in texts] == theirs(texts).input_ids
    assert (ours.prefix_ids, ours.suffix_ids, ours.pad_id, ours.vocab_size) == ((), (1,), 0, len(pieces) + 100)
    assert ours.special_id("<extra_id_0>") == len(pieces) + 99 and not ours.special_ids & set(
        ours.encode("<extra_id_0>")
    )

    data = sentencepiece_bytes("unigram", rule="nmt_nfkc")
    pieces = [(piece.text, piece.score) for piece in read_model(data, "m").pieces]
    config = {"tokenizer_class": "XLMRobertaTokenizer"}
    ours = Tokenizer.load(folder(tmp_path / "xlm", {"sentencepiece.bpe.model": data}, config))
    theirs = XLMRobertaTokenizer(vocab=XLMRobertaConverter.convert_from_spm(vocab=pieces)["vocab"])
    assert [ours.encode_input(text) for text in texts] == theirs(texts).input_ids
    assert (ours.bos_id, ours.pad_id, ours.eos_id, ours.unk_id, ours.mask_id) == (0, 1, 2, 3, len(pieces) + 1)
    assert (ours.prefix_ids, ours.suffix_ids, ours.vocab_size) == ((0,), (2,), len(pieces) + 2)

    data = sentencepiece_bytes("bpe", byte_fallback=True, remove_extra_whitespaces=False)
    model = json.loads(Tokenizer.load(folder(tmp_path / "bare", {"tokenizer.model": data})).to_json())["model"]
    for number, (flags, before, behind) in enumerate(
        [({}, (1,), ()), ({"add_bos_token": False}, (), ()), ({"add_eos_token": True}, (1,), (2,))]
    ):
        config = {"tokenizer_class": "LlamaTokenizer", **flags}
        ours = Tokenizer.load(folder(tmp_path / f"llama{number}", {"tokenizer.model": data}, config))
        full = {"add_bos_token": True, "add_eos_token": False} | flags
        theirs = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **full)
        assert [ours.encode_input(text) for text in texts] == theirs(texts).input_ids
        assert (ours.prefix_ids, ours.suffix_ids) == (before, behind)
    without = folder(tmp_path / "no prefix", {"tokenizer.model": data}, {**config, "add_prefix_space": False})
    assert Tokenizer.load(without).encode(" the") == Tokenizer.load(tmp_path / "bare").encode("the")


def test_the_order_of_forms(tmp_path):
    files = {**byte_level_files(), **word_piece_files(True), "tokenizer.model": sentencepiece_bytes("bpe")}
    path = folder(tmp_path / "all", {**files, "tokenizer.json": trained("unigram").to_json()})
    for name, kind in [("tokenizer.json", "unigram"), ("vocab.json", "bpe"), ("vocab.txt", "wordpiece")]:
        assert Tokenizer.load(path).kind == kind == Tokenizer.load(path / name).kind
        (path / name).unlink()
    assert Tokenizer.load(path).unk_id == 0
    (path / "tokenizer.model").rename(path / "other.model")
    assert Tokenizer.load(path).encode("the") == Tokenizer.load(path / "other.model").encode("the")
    (path / "second.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(path)


def test_tokens_that_only_the_files_beside_name(tmp_path):
    made = tree("bpe")
    size = len(made["model"]["vocab"])
    decoder = tool(size, "<|im_start|>", True) | tool(size + 1, "<tool>", False) | tool(0, "<|endoftext|>", True)
    path = folder(tmp_path / "a", {"tokenizer.json": json.dumps(made)}, {"added_tokens_decoder": decoder})
    loaded = Tokenizer.load(path)
    assert loaded.special_id("<|im_start|>") == size and loaded.encode("<tool>") == [size + 1]
    assert size not in loaded.encode("<|im_start|>") and loaded.vocab_size == size + 2
    path = folder(tmp_path / "b", byte_level_files(), added_tokens={"<|x|>": 1500, "<y>": 1501})
    (path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["<|x|>", "<mask>"]}))
    loaded = Tokenizer.load(path)
    assert loaded.special_id("<|x|>") == 1500 and loaded.encode("<y>") == [1501]
    assert loaded.special_id("<mask>") == 4 and loaded.special_id("<y>") is None


def test_a_tokenizer_json_has_its_own_template(tmp_path):
    """Flags beside it count for nothing, as in transformers 5."""
    made = tree("bpe")
    processor = {"type": "BertProcessing", "sep": ["<|user|>", 1], "cls": ["<|endoftext|>", 0]}
    for number, made["post_processor"] in enumerate((None, processor)):
        for entry in made["added_tokens"]:
            entry.pop("roles", None)
        config = {"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"add_bos_token": not number}
        path = folder(tmp_path / str(number), {"tokenizer.json": json.dumps(made)}, config)
        ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
        assert ours.encode_input("hello") == theirs("hello").input_ids and bool(ours.prefix_ids) == bool(number)


PROCESSORS = [
    ({"type": "BertProcessing", "sep": ["<|user|>", 1], "cls": ["<|endoftext|>", 0]}, (0,), (1,)),
    (
        {
            "type": "RobertaProcessing",
            "sep": ["<|user|>", 1],
            "cls": ["<|endoftext|>", 0],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        (0,),
        (1,),
    ),
    ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, (), ()),
    (
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|user|>", "type_id": 0}},
                {"SpecialToken": {"id": "<|user|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [1, 0], "tokens": ["<|user|>", "<|endoftext|>"]}},
        },
        (1, 0, 1, 0),
        (),
    ),
]


@pytest.mark.parametrize("case", PROCESSORS, ids=lambda case: case[0]["type"])
def test_templates_inside_a_tokenizer_json(case):
    processor, before, behind = case
    made = tree("bpe")
    for node in (processor, {"type": "Sequence", "processors": [PROCESSORS[2][0], processor]}):
        made["post_processor"] = node
        loaded = Tokenizer(made)
        assert (loaded.prefix_ids, loaded.suffix_ids) == (before, behind)
        assert loaded.encode_input("the end") == [*before, *loaded.encode("the end"), *behind]
        assert tokenizers.Tokenizer.from_str(json.dumps(made)).encode("the end").ids == loaded.encode_input("the end")


@pytest.mark.fault("T4", "T6")
def test_templates_that_do_not_fit():
    made = tree("bpe")
    made["post_processor"] = {"type": "BertProcessing", "sep": ["x", 600], "cls": ["y", 0]}
    with pytest.raises(InputError, match=r"f post_processor: ids \(0,\) and \(600,\) with 600 tokens"):
        Tokenizer(made, "f")
    twice = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
    made["post_processor"] = {"type": "TemplateProcessing", "single": twice, "pair": [], "special_tokens": {}}
    with pytest.raises(InputError, match="f post_processor: a template without the text, or with it twice"):
        Tokenizer(made, "f")
    once = [{"Sequence": {"id": "A", "type_id": 0}}]
    made["post_processor"] = {"type": "TemplateProcessing", "single": once, "pair": once, "special_tokens": {}}
    fine = Tokenizer(made, "f")  # only who asks for pairs is told
    with pytest.raises(InputError, match="f post_processor: a template without the text, or with it twice"):
        _ = fine.pair_ids


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_chat_template(form, tmp_path):
    config: dict[str, Any] = {"eos_token": "<|user|>"}
    if form == "string":
        config["chat_template"] = TEMPLATE
    elif form == "list":
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    else:
        config["chat_template"] = "an older one"
    path = folder(tmp_path / "a", {"tokenizer.json": trained("bpe").to_json()}, config)
    if form == "file":
        (path / "chat_template.jinja").write_text(TEMPLATE)
    loaded = Tokenizer.load(path)
    assert loaded.chat_template == TEMPLATE and loaded.hash == trained("bpe").hash
    again = Tokenizer.load(loaded.save(tmp_path / "b"))
    assert again.chat_template == TEMPLATE
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    messages = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.chat_template == TEMPLATE and rendered == f"hello{theirs.eos_token}\n"
    loaded.chat_template = None
    loaded.save(tmp_path / "b")
    assert (
        Tokenizer.load(tmp_path / "b").chat_template is None and not (tmp_path / "b" / "chat_template.jinja").exists()
    )


@pytest.mark.fault("T4")
def test_chat_templates_that_are_none(tmp_path):
    assert chat_template(None, "f") is None and chat_template({"chat_template": []}, "f") is None
    for value in (3, {"a": 1}, "x" * (1 << 20) + "x", [{"name": "default", "template": 3}]):
        with pytest.raises(InputError, match="f chat_template: a "):
            chat_template({"chat_template": value}, "f")
    path = folder(tmp_path / "a", {"tokenizer.json": trained("byte").to_json(), "chat_template.jinja": b"a\xff"})
    with pytest.raises(InputError, match=r"chat_template\.jinja: invalid UTF-8 at byte 1"):
        Tokenizer.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_save_writes_loads_in_transformers(kind, tmp_path):
    made = trained(kind)
    made.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (made.eos_id, made.unk_id, made.pad_id)
    assert theirs(SENTENCES[0]).input_ids == made.encode_input(SENTENCES[0])
    alone = made.save(tmp_path / "alone" / "mine.json")
    assert [path.name for path in alone.parent.iterdir()] == ["mine.json"] and Tokenizer.load(alone).hash == made.hash


SMALL = sentencepiece_file([*ENDS, ("a", -1.0, 1), ("b", -1.0, 1)], 2)
WRONG = [
    ({"vocab.json": "[]", "merges.txt": ""}, {}, "vocab.json: is not an object"),
    ({"vocab.json": "{}", "merges.txt": ""}, {}, "model.vocab: empty"),
    ({"vocab.json": '{"a": 0}'}, {}, "merges.txt: no such file"),
    ({"vocab.json": '{"a": "x"}', "merges.txt": ""}, {}, "model.vocab: id 'x' of 'a'"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, {}, "model.merges[0]"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a a a\n"}, {}, "model.merges[0]"),
    ({"vocab.json": '{"a": 0}', "merges.txt": b"a \xff\n"}, {}, "merges.txt: invalid UTF-8 at byte 2"),
    (
        {"vocab.json": '{"a": 0}', "merges.txt": ""},
        {"tokenizer_class": "CLIPTokenizer"},
        "tokenizer_class 'CLIPTokenizer'",
    ),
    (
        {"vocab.json": '{"a": 0}', "merges.txt": ""},
        {"tokenizer_class": "RobertaTokenizer"},
        "'<s>' is not in the vocabulary",
    ),
    ({"vocab.json": '{"a": 0}', "merges.txt": ""}, {"add_prefix_space": "yes"}, "key 'add_prefix_space' is a string"),
    (
        {"vocab.json": '{"a": 0}', "merges.txt": ""},
        {"added_tokens_decoder": {"x": "y"}},
        "added_tokens_decoder: entry 'x'",
    ),
    ({"vocab.json": '{"a": 0}', "merges.txt": ""}, {"added_tokens_decoder": []}, None),
    ({"vocab.txt": "[CLS]\n[SEP]\n"}, {}, "model.unk_token: '[UNK]' is not in the vocabulary"),
    ({"vocab.txt": "[UNK]\na\n"}, {}, "'[CLS]' is not in the vocabulary"),
    ({"vocab.txt": b"[UNK]\n\xc3"}, {}, "vocab.txt: invalid UTF-8"),
    ({"vocab.txt": "[UNK]\n"}, {"do_lower_case": 1}, "key 'do_lower_case' is an integer"),
    ({"vocab.txt": "[UNK]\n"}, {"tokenizer_class": "T5Tokenizer"}, "expected one of BertTokenizer"),
    ({"tokenizer.model": SMALL}, {"tokenizer_class": "AlbertTokenizer"}, "AutoTokenizer.from_pretrained"),
    ({"tokenizer.model": SMALL}, {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9}, "extra_ids 1000000000"),
    ({"tokenizer.model": SMALL}, {"tokenizer_class": "T5Tokenizer", "extra_ids": "3"}, "'extra_ids' is a string"),
    ({"x.model": sentencepiece_file([("a", 0.0, 2)])}, {"tokenizer_class": "XLMRobertaTokenizer"}, "as in XLM-R"),
    ({}, {}, "tokenizer.json: no such file"),
]


@pytest.mark.fault("T4")
@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(case[2])[:50])
def test_what_is_refused(case, tmp_path):
    files, config, message = case
    path = folder(tmp_path / "model", files, config)
    if message is None:
        assert Tokenizer.load(path).kind in ("bpe", "byte")
        return
    with pytest.raises(InputError) as caught:
        Tokenizer.load(path)
    assert message in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.fault("T4")
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
def test_damaged_files_beside(name, tmp_path):
    path = folder(tmp_path / "model", {"tokenizer.json": trained("byte").to_json()})
    for content in ("[]", "{", "3", '{"a": NaN}'):
        (path / f"{name}.json").write_text(content)
        with pytest.raises(InputError, match=rf"{name}\.json"):
            Tokenizer.load(path)


@pytest.mark.fault("T4")
def test_cut_vocabularies(tmp_path):
    for files, config in ((byte_level_files(), {}), (word_piece_files(True), {})):
        for part in range(0, 50, 3):
            cut = {name: content[: len(content) * part // 50] for name, content in files.items()}
            path = folder(tmp_path / "model", cut, config)
            try:
                assert Tokenizer.load(path).vocab_size <= 1500  # a vocab.txt cut between lines is a smaller one
            except InputError as error:
                assert str(path) in str(error)
        for name in files:
            (path / name).unlink()
