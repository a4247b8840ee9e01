"""Other runtimes asked for the same work as Headway, one after the other, on the same machine: what `bench` compares.

Each reads the model from a file of its own form: llama.cpp (package xllamacpp) and OpenVINO GenAI the GGUF file,
transformers and CTranslate2 a folder as the hub has it. Nothing here is needed by anything else; what is not installed
is not asked. Left out: runtimes on a GPU, and embeddings elsewhere than in transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from headway import api, loading, saving
from headway.errors import BugError
from headway.evaluation.embed import longest_text
from headway.generation import GenerationOptions, generate
from headway.loading import Loaded
from headway.nn.packed import is_packed


class Work(NamedTuple):
    """What everybody is asked for: `new` tokens behind each prompt, all equally long; or the vectors of texts."""

    prompts: Sequence[list[int]] = ()
    new: int = 1
    texts: Sequence[str] = ()


class Given:
    """A model, and files in the forms that others read, written to `place` when somebody asks for them."""

    def __init__(self, loaded: Loaded, place: Path, threads: int) -> None:
        self.loaded, self.threads, self._place = loaded, threads, place

    @functools.cached_property
    def gguf(self) -> Path:
        """The file itself, or one with the same codes."""
        if self.loaded.form == "gguf":
            return self.loaded.path
        return saving.save(self.loaded, self._place / "model.gguf", "gguf")

    @functools.cached_property
    def folder(self) -> Path:
        """As the hub has it, in float32."""
        plain = loading.load(self.loaded.path, dtype="float32")
        return saving.save(plain, self._place / "model", "hf")

    @functools.cached_property
    def converted(self) -> Path:
        """As CTranslate2 has it, in int8 where the model is in codes."""
        converter = _module("ctranslate2.converters").TransformersConverter(str(self.folder))
        converter.convert(str(self._place / "converted"), quantization="int8" if is_packed(self.loaded.model) else None)
        return self._place / "converted"


class Peer:
    """A runtime with a model. `package` is what it needs; `does` what it can be asked for."""

    package: ClassVar[str]
    does: ClassVar[frozenset[str]]

    def __init__(self, given: Given) -> None:
        self._given = given

    def write(self, work: Work) -> float:
        """Seconds for reading the prompts and writing behind each."""
        raise BugError("peer", f"{type(self).__name__} writes nothing")

    def reading(self, work: Work) -> float:
        """Tokens of the prompts a second, of all together."""
        return len(work.prompts) * len(work.prompts[0]) / self.write(work._replace(new=1))

    def writing(self, work: Work) -> float:
        """Tokens a second behind the first, of all prompts together."""
        begun = self.write(work._replace(new=1))
        return len(work.prompts) * (work.new - 1) / max(self.write(work) - begun, 1e-9)

    def vectors(self, texts: Sequence[str]) -> float:
        """Seconds for a vector of each text."""
        raise BugError("peer", f"{type(self).__name__} gives no vectors")


WRITING = frozenset(("decode", "prefill", "batch"))


def _module(name: str) -> Any:
    return importlib.import_module(name)


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Headway(Peer):
    """Ourselves."""

    package = "headway"
    does = WRITING | {"embed"}

    def write(self, work: Work) -> float:
        """Greedily, in one batch."""
        options = GenerationOptions(
            max_tokens=work.new, min_tokens=work.new, temperature=0.0, batch_size=len(work.prompts)
        )
        return clock(lambda: generate(self._given.loaded.model, self._given.loaded.words, list(work.prompts), options))

    def vectors(self, texts: Sequence[str]) -> float:
        """As the model's head says."""
        return clock(lambda: api.embed(self._given.loaded, texts))


class LlamaCpp(Peer):
    """llama.cpp's own server, asked over HTTP on the loopback; each prompt of a batch has a slot."""

    package = "xllamacpp"
    does = WRITING

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._server: Any = None
        self._rows, self._tokens = 0, 1024  # of the server that there is: a longer text needs another

    def _address(self, work: Work) -> str:
        rows, tokens = len(work.prompts), len(work.prompts[0]) + work.new
        if rows != self._rows or tokens > self._tokens:
            self._rows, self._tokens = rows, max(self._tokens, 1 << tokens.bit_length())
            params = _module(self.package).CommonParams()
            params.model.path, params.n_gpu_layers, params.verbosity = str(self._given.gguf), 0, 0
            params.n_ctx, params.n_parallel = rows * self._tokens, rows
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._given.threads
            self._server = _module(self.package).Server(params)
        address: str = self._server.listening_address.split("//")[1]
        return address

    def _ask(self, address: str, ids: list[int], new: int) -> dict[str, float]:
        import http.client

        body = {"prompt": ids, "n_predict": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        with contextlib.closing(http.client.HTTPConnection(address)) as line:
            line.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            told: dict[str, float] = json.loads(line.getresponse().read())["timings"]
        return told

    def _told(self, work: Work) -> dict[str, float]:
        return self._ask(self._address(work), work.prompts[0], work.new)

    def reading(self, work: Work) -> float:
        """As it says of itself, without the way there."""
        one = work._replace(new=1)
        return self._told(one)["prompt_per_second"] if len(work.prompts) == 1 else super().reading(one)

    def writing(self, work: Work) -> float:
        """As it says of itself."""
        return self._told(work)["predicted_per_second"] if len(work.prompts) == 1 else super().writing(work)

    def write(self, work: Work) -> float:
        """All prompts at once, by the clock."""
        address = self._address(work)
        with ThreadPoolExecutor(len(work.prompts)) as pool:
            return clock(lambda: list(pool.map(lambda ids: self._ask(address, ids, work.new), work.prompts)))


class Transformers(Peer):
    """transformers in float32."""

    package = "transformers"
    does = WRITING | {"embed"}

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        _module("transformers.utils.logging").disable_progress_bar()
        config, kinds = given.loaded.config, {"decoder": "CausalLM", "encoder-decoder": "Seq2SeqLM"}
        name = f"AutoModelFor{kinds[config.kind]}" if config.head.type == "causal-lm" else "AutoModel"
        self._model: Any = getattr(_module(self.package), name).from_pretrained(given.folder).eval()

    def write(self, work: Work) -> float:
        """With its own `generate`."""
        ids = torch.tensor(list(work.prompts))
        length = {"max_new_tokens": work.new, "min_new_tokens": work.new, "do_sample": False, "pad_token_id": 0}
        return clock(lambda: self._model.generate(ids, attention_mask=torch.ones_like(ids), **length))

    @functools.cached_property
    def _words(self) -> Any:
        words = _module(self.package).AutoTokenizer.from_pretrained(self._given.folder)
        words.pad_token = words.pad_token or words.eos_token
        return words

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """Mean over real tokens, of length one, (texts, size): by length and in batches of 32, as sentence-transformers
        does."""
        longest = longest_text(self._given.loaded.config)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out = torch.empty(len(texts), self._model.config.hidden_size)
        with torch.no_grad():
            for start in range(0, len(order), 32):
                some = order[start : start + 32]
                how = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
                given = self._words([texts[i] for i in some], **how)
                real = given["attention_mask"][..., None]
                states = self._model(**given).last_hidden_state
                out[some] = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
        return out

    def vectors(self, texts: Sequence[str]) -> float:
        """See `embeddings`; reading the tokenizer is not counted."""
        assert self._words is not None
        return clock(lambda: self.embeddings(texts))


class CTranslate2(Peer):
    """CTranslate2, in int8 where the model is in codes."""

    package = "ctranslate2"
    does = WRITING

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._is_pair = given.loaded.model.is_pair
        threads = {"inter_threads": 1, "intra_threads": given.threads}
        kind = "Translator" if self._is_pair else "Generator"
        self._model = getattr(_module(self.package), kind)(str(given.converted), **threads)

    def write(self, work: Work) -> float:
        """Greedily, in one batch."""
        words = self._given.loaded.words
        tokens = [[words.token(i) or "" for i in ids] for ids in work.prompts]
        if self._is_pair:
            length = {"max_decoding_length": work.new, "min_decoding_length": work.new, "beam_size": 1}
            return clock(lambda: self._model.translate_batch(tokens, **length))
        length = {"max_length": work.new, "min_length": work.new, "include_prompt_in_result": False}
        return clock(lambda: self._model.generate_batch(tokens, **length))


class OpenVino(Peer):
    """OpenVINO GenAI, which reads GGUF files."""

    package = "openvino_genai"
    does = frozenset(("decode", "prefill"))

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._openvino = _module("openvino")
        self._library = _module(self.package)
        how = self._library.SchedulerConfig()
        how.enable_prefix_caching = False  # else a prompt that was asked before is not read again
        options = {"INFERENCE_NUM_THREADS": given.threads, "scheduler_config": how}
        self._pipe = self._library.LLMPipeline(str(given.gguf), "CPU", **options)

    def write(self, work: Work) -> float:
        """Of one prompt, greedily."""
        import numpy as np

        how = self._library.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = work.new
        how.ignore_eos, how.do_sample = True, False
        ids = self._openvino.Tensor(np.array(work.prompts, np.int64))
        return clock(lambda: self._pipe.generate(ids, how))


PEERS: Mapping[str, type[Peer]] = {
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "openvino": OpenVino,
}


def rate(what: str, peer: Peer, work: Work) -> float:
    """Tokens a second, of all prompts together: read (prefill), written behind the first (decode), or written with all
    the reading (batch). Texts a second (embed)."""
    match what:
        case "prefill":
            return peer.reading(work)
        case "decode":
            return peer.writing(work)
        case "batch":
            return len(work.prompts) * work.new / peer.write(work)
        case _:
            return len(work.texts) / peer.vectors(work.texts)


class Rate(NamedTuple):
    """The median of some rounds, and the lowest and the highest."""

    median: float
    low: float
    high: float


def in_turn(calls: Mapping[str, Callable[[], float]], rounds: int, told: Callable[[int], None]) -> dict[str, Rate]:
    """Each call once to warm up, and then once a round, one after the other."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            figure = call()
            if number:
                found[name].append(figure)
        told(number)
    return {name: Rate(statistics.median(some), min(some), max(some)) for name, some in found.items()}


def opened(names: Sequence[str], what: str, given: Given) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that can be asked, and why the others cannot."""
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name in names:
        kind = PEERS[name]
        if what not in kind.does:
            absent[name] = f"is not asked for {what} here"
        elif importlib.util.find_spec(kind.package) is None:
            absent[name] = f"is not installed (pip install {kind.package.replace('_', '-')})"
        else:
            try:
                peers[name] = kind(given)
            except Exception as error:  # of code that is not ours: whatever it is, it does not know this model
                absent[name] = f"cannot load it: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    return peers, absent
