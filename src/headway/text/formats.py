"""The files in which tokenizers come, each turned into the tree of a tokenizer.json.

What a folder holds is found by the names of its files; which class of transformers they were made for, and with it
the defaults and the template around a text, by `tokenizer_class` in tokenizer_config.json, by `model_type` in
config.json, else by the form of the files (facts from transformers, models/*/tokenization_*.py).
Left out: classes that change a text before its pieces are found (ALBERT, CLIP, XLM) and tiktoken files: their folders
need a tokenizer.json, and the error says how to make one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from headway.errors import InputError
from headway.files import read_bytes
from headway.strict import dump_json, strict_json
from headway.strict import field as key_of
from headway.text.patterns import SPLIT_PATTERNS
from headway.text.sentencepiece import CONTROL, UNKNOWN, Model, Piece, model_tree, read_model
from headway.text.spec import added_entry, empty_tree

FILE, TEMPLATE = "tokenizer.json", "chat_template.jinja"
MAX_FILE = 256 << 20
MAX_TEMPLATE = 1 << 20
MAX_EXTRA = 10_000  # sentinel tokens of T5
Tree = dict[str, object]
_CONFIG = "tokenizer_config.json"
_FORMS = (FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FIX = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"


@dataclass(frozen=True)
class _Class:
    """What a class of transformers says where tokenizer_config.json is silent."""

    tokens: Mapping[str, str | None] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    """What stands before the second of two texts, beside the first one's suffix."""


_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = _Class(dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
_QWEN2 = _Class(dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"))
_ROBERTA = _Class(
    _ENDS | {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    *(("cls_token",), ("sep_token",), ("sep_token",)),
)
_BERT = _Class(
    {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")},
    *(("cls_token",), ("sep_token",)),
)
_LLAMA = _Class(_ENDS, ("bos_token",), (), ("bos_token",))
_GEMMA = replace(
    _LLAMA, tokens={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
)
_T5 = _Class({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, (), ("eos_token",))

# The classes that each form may be of; the first is what the form is without a word from anybody.
_BYTE_LEVEL = {"GPT2Tokenizer": _GPT2, "GPTNeoXTokenizer": _GPT2, "CodeGenTokenizer": _GPT2, "Qwen2Tokenizer": _QWEN2}
_BYTE_LEVEL |= dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"), _ROBERTA)
_WORDPIECE = dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"), _BERT)
_SENTENCEPIECE = {"none": _Class(), "LlamaTokenizer": _LLAMA, "GemmaTokenizer": _GEMMA, "T5Tokenizer": _T5}
_SENTENCEPIECE |= {"MT5Tokenizer": _T5, "XLMRobertaTokenizer": _ROBERTA}
_BY_MODEL_TYPE = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "GPT2Tokenizer"),
    **dict.fromkeys(("roberta", "bart", "longformer", "led"), "RobertaTokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra", "mobilebert"), "BertTokenizer"),
    **dict.fromkeys(("llama", "mistral", "mixtral"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2"), "GemmaTokenizer"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    "xlm-roberta": "XLMRobertaTokenizer",
}


def find_tokenizer(path: Path) -> tuple[object, str, dict[str, object]]:
    """The tree of the tokenizer in a folder or file, the name of its file, and what stands beside it.

    A folder is searched for tokenizer.json, vocab.json with merges.txt, vocab.txt and a SentencePiece model, in this
    order. The last value holds the keys of tokenizer_config.json, filled up from special_tokens_map.json,
    added_tokens.json and chat_template.jinja.

    Raises:
        InputError: nothing there, a damaged file, a class that this form cannot express.
    """
    file = _file(path)
    where, config = str(file), _beside(file.parent)
    known: _Class | None
    if file.suffix == ".model":
        known, config = _class(config, file.parent, _SENTENCEPIECE)
        tree: object = _from_model(file, config)
    elif file.name == "vocab.txt":
        known, config = _class(config, file.parent, _WORDPIECE)
        tree = _word_pieces(file, config)
    elif file.name in ("vocab.json", "merges.txt"):
        known, config = _class(config, file.parent, _BYTE_LEVEL)
        tree = _byte_level(file.parent, config)
    else:
        known, tree = None, strict_json(read_bytes(file, MAX_FILE), where)  # with a template of its own
    if isinstance(tree, dict):
        _add_tokens(tree, config, str(file.with_name(_CONFIG)))
        if known:
            _set_template(tree, known, config, where)
    return tree, where, config


def beside_files(roles: Mapping[str, str], template: str | None) -> dict[str, str | None]:
    """What transformers reads beside tokenizer.json, by file name; None for a file that must not be there."""
    tokens = {f"{role}_token": content for role, content in roles.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    return {_CONFIG: dump_json(config), TEMPLATE: template}


def chat_template(config: object, where: str) -> str | None:
    """The `chat_template` of a tokenizer_config.json: a string, or the one named `default` of several.

    Raises:
        InputError: something else, or one of more than MAX_TEMPLATE characters.
    """
    value = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEMPLATE):
        size = f" of {len(value)} characters" if isinstance(value, str) else ""
        raise InputError(
            f"{where} chat_template", f"a {type(value).__name__}{size}", f"up to {MAX_TEMPLATE} characters"
        )
    return value


def content_of(token: object) -> str | None:
    """The text of a token that a config writes as a string or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def template(prefix: Iterable[str], suffix: Iterable[str], between: Iterable[str], ids: Mapping[str, int]) -> Tree:
    """The post-processor that puts tokens around a text.

    Raises:
        InputError: a token without an id.
    """
    before, after, middle = list(prefix), list(suffix), list(between)
    missing = [token for token in before + after + middle if token not in ids]
    if missing:
        raise InputError("template", f"{missing[0][:40]!r} is not in the vocabulary", "a token of it")

    def tokens(names: list[str], number: int) -> list[object]:
        return [{"SpecialToken": {"id": name, "type_id": number}} for name in names]

    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    single = [*tokens(before, 0), first, *tokens(after, 0)]
    used = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in before + after + middle}
    pair = [*single, *tokens(middle, 1), second, *tokens(after, 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def byte_level_tree(vocab: Mapping[str, int], merges: list[str], steps: list[object], whole: bool = False) -> Tree:
    """Byte-level BPE with these pre-tokenizer steps; `whole`: a word that is a token is taken whole."""
    model = {"type": "BPE", "vocab": dict(vocab), "merges": merges, "ignore_merges": whole}
    model |= {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return empty_tree(model) | {"pre_tokenizer": pre_tokenizer, "decoder": decoder}


def byte_level(prefix_space: bool = False, use_regex: bool = False) -> Tree:
    """The pre-tokenizer that spells bytes as characters, with GPT-2's pattern or none."""
    return {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": use_regex}


def split(pattern: str) -> Tree:
    """The pre-tokenizer that sets every match of a pattern apart."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def word_piece_tree(vocab: Mapping[str, int], unknown: str, options: Mapping[str, bool | None]) -> Tree:
    """BERT's tokenizer (arXiv:1810.04805); options are those of the node BertNormalizer."""
    model: Tree = {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##"}
    tree = empty_tree({**model, "max_input_chars_per_word": 100, "vocab": dict(vocab)})
    tree["normalizer"] = {"type": "BertNormalizer", "clean_text": True, **options}
    tree["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    tree["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return tree


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / name for name in _FORMS if (path / name).is_file()]
    models = sorted(path.glob("*.model"))
    return named[0] if named else models[0] if len(models) == 1 else path / FILE


def _object(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    found = strict_json(read_bytes(file, MAX_FILE), str(file))
    if not isinstance(found, dict):
        raise InputError(str(file), "is not an object", "an object")
    return found


def _beside(folder: Path) -> dict[str, object]:
    config = _object(folder / "special_tokens_map.json") | _object(folder / _CONFIG)
    if (folder / TEMPLATE).is_file():
        text = read_bytes(folder / TEMPLATE, 4 * MAX_TEMPLATE)
        try:
            config["chat_template"] = text.decode()
        except UnicodeDecodeError as error:
            raise InputError(str(folder / TEMPLATE), f"invalid UTF-8 at byte {error.start}", "UTF-8") from None
    added = _object(folder / "added_tokens.json")
    return config | ({"added_tokens": added} if added else {})


def _class(config: Tree, folder: Path, known: Mapping[str, _Class]) -> tuple[_Class, Tree]:
    """The class of these files, and the config filled up with what the class says."""
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        model = _object(folder / "config.json")
        name = model.get("tokenizer_class") or _BY_MODEL_TYPE.get(str(model.get("model_type"))) or next(iter(known))
    name = str(name).removesuffix("Fast")
    if name in ("PreTrainedTokenizer", "TokenizersBackend"):
        name = next(iter(known))
    if name not in known:
        expected = f"one of {', '.join(known)} for these files"
        raise InputError(str(folder / _CONFIG), f"tokenizer_class {name[:60]!r}", expected, _FIX)
    return known[name], {**known[name].tokens, **config, "tokenizer_class": name}


def _switch(config: Tree, name: str, default: bool | None) -> bool | None:
    if name not in config:
        return default
    return cast("bool | None", key_of(config, name, (bool, type(None)), _CONFIG))


def _byte_level(folder: Path, config: Tree) -> Tree:
    vocab = strict_json(read_bytes(folder / "vocab.json", MAX_FILE), str(folder / "vocab.json"))
    if not isinstance(vocab, dict):
        raise InputError(str(folder / "vocab.json"), "is not an object", "tokens with ids")
    lines = _lines(folder / "merges.txt")
    merges = [line for line in lines if line and not line.startswith("#version")]
    prefix_space = bool(_switch(config, "add_prefix_space", False))
    steps: list[object] = [byte_level(prefix_space, use_regex=True)]
    if config["tokenizer_class"] == "Qwen2Tokenizer":
        steps = [split(SPLIT_PATTERNS["qwen-2"]), byte_level(prefix_space)]
    tree = byte_level_tree(vocab, merges, steps)
    return tree | ({"normalizer": {"type": "NFC"}} if config["tokenizer_class"] == "Qwen2Tokenizer" else {})


def _word_pieces(file: Path, config: Tree) -> Tree:
    lines = _lines(file)
    vocab = {line: number for number, line in enumerate(lines[:-1] if lines[-1:] == [""] else lines)}
    options = {
        "handle_chinese_chars": _switch(config, "tokenize_chinese_chars", True),
        "strip_accents": _switch(config, "strip_accents", None),
        "lowercase": _switch(config, "do_lower_case", True),
    }
    return word_piece_tree(vocab, content_of(config.get("unk_token")) or "[UNK]", options)


def _lines(file: Path) -> list[str]:
    try:
        return read_bytes(file, MAX_FILE).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(str(file), f"invalid UTF-8 at byte {error.start}", "UTF-8") from None


def _from_model(file: Path, config: Tree) -> Tree:
    where, name = str(file), config["tokenizer_class"]
    model = read_model(read_bytes(file, MAX_FILE), f"{where} (as a SentencePiece model)")
    if any(content_of(config.get(f"{role}_token")) for role in ("bos", "eos", "pad", "cls", "sep")):
        model = replace(model, roles={})
    if name in ("T5Tokenizer", "MT5Tokenizer"):
        count = key_of({"extra_ids": 100} | config, "extra_ids", int, _CONFIG)
        if not 0 <= cast("int", count) <= MAX_EXTRA:
            raise InputError(_CONFIG, f"extra_ids {count}"[:60], f"0 to {MAX_EXTRA}")
        extra = [Piece(f"<extra_id_{number}>", 0.0, CONTROL) for number in reversed(range(cast("int", count)))]
        model = replace(model, pieces=[*model.pieces, *extra])
    elif name == "XLMRobertaTokenizer":
        model = _fairseq(model, where)
    if _switch(config, "add_prefix_space", None) is False:
        model = replace(model, flags={**model.flags, "add_dummy_prefix": False})
    return model_tree(model, where)


def _fairseq(model: Model, where: str) -> Model:
    """XLM-R numbers its tokens as fairseq did: four of its own, then the pieces from the third on, then <mask>."""
    if [piece.text for piece in model.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        found = f"pieces {[piece.text[:20] for piece in model.pieces[:3]]}"
        raise InputError(where, found, "<unk>, <s>, </s> at the beginning, as in XLM-R", _FIX)
    front = [Piece(text, 0.0, CONTROL) for text in ("<s>", "<pad>", "</s>")]
    pieces = [*front, Piece("<unk>", 0.0, UNKNOWN), *model.pieces[3:], Piece("<mask>", 0.0, CONTROL)]
    return replace(model, pieces=pieces)


def _ids(tree: Tree) -> dict[str, int]:
    """The ids of all tokens, of a tree that nobody has checked yet."""
    model = tree.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocab, dict):
        ids |= {piece: number for piece, number in vocab.items() if type(number) is int}
    elif isinstance(vocab, list):
        ids |= {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = tree.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return ids | {str(entry.get("content")): entry["id"] for entry in entries if type(entry.get("id")) is int}


def _add_tokens(tree: Tree, config: Tree, where: str) -> None:
    """Add to the tree the tokens that only the files beside it name."""
    listed = tree.get("added_tokens") or []
    if not isinstance(listed, list):
        return  # read_spec says so
    present = {entry.get("content") for entry in listed if isinstance(entry, dict)}
    more = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    named = [value for values in more if isinstance(values, list) for value in values]
    named += [value for key, value in config.items() if key.endswith("_token") and value is not None]
    special = {content: value for value in named if (content := content_of(value))}
    found: dict[str, dict[str, object]] = {}
    for content, number in cast("dict[str, object]", config.get("added_tokens") or {}).items():
        found[content] = {"id": number, "special": content in special}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{where} added_tokens_decoder", "is not an object", "ids with tokens")
    for number, token in decoder.items():
        content = content_of(token)
        if not number.isdecimal() or len(number) > 10 or content is None:
            raise InputError(f"{where} added_tokens_decoder", f"entry {number[:20]!r}", "an id with a token")
        flags = token if isinstance(token, dict) else {"special": content in special}
        found[content] = {**flags, "id": int(number)}
    ids = _ids(tree)
    for content, value in special.items():
        if content in ids and content not in found:
            found[content] = {**(value if isinstance(value, dict) else {}), "id": ids[content], "special": True}
    entries = []
    for content, flags in found.items():
        if content not in present:
            is_special = flags.get("special") is True
            entry = {**added_entry(0, content), "normalized": not is_special, **flags, "content": content}
            entries.append({key: entry[key] for key in added_entry(0, content)} | {"special": is_special})
    if entries:
        tree["added_tokens"] = sorted([*listed, *entries], key=lambda entry: str(entry["id"]).zfill(12))


def _set_template(tree: Tree, known: _Class, config: Tree, where: str) -> None:
    ends = {}
    for end, default in (("bos", known.prefix == ("bos_token",)), ("eos", False)):
        wanted = _switch(config, f"add_{end}_token", default)
        ends[end] = [f"{end}_token"] if wanted and content_of(config.get(f"{end}_token")) else []
    prefix, suffix, between = list(known.prefix), list(known.suffix), list(known.between)
    if not known.suffix:  # a class whose template is nothing but these two
        prefix, suffix, between = ends["bos"], ends["eos"], ends["bos"]
    if not prefix and not suffix:
        tree["post_processor"] = None
        return
    before, after, middle = (
        [content_of(config.get(role)) or role for role in roles] for roles in (prefix, suffix, between)
    )
    try:
        tree["post_processor"] = template(before, after, middle, _ids(tree))
    except InputError as error:
        raise InputError(where, error.found, error.expected, _FIX) from None
