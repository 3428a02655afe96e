"""EleutherAI's lm-evaluation-harness over our models: the scores that its own `hf` model gives, faster.

    neox-jax eval --model SOURCE --tasks lambada_openai,piqa
    lm_eval --model neox_jax --model_args pretrained=SOURCE,dtype=float32 --tasks piqa

Nothing is prepended to a text but the end-of-text token where a context is empty, and in front of a text that is scored
as a whole; padded rows of the vocabulary take part, as in Hugging Face's models.
Source: lm_eval 0.4.13, models/huggingface.py and api/model.py.
"""

import atexit
import contextlib
import copy
import os
import sys
from collections.abc import Callable

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from neox_jax.config import parse_scoring_mesh
from neox_jax.convert.source import load_model
from neox_jax.distributed import find_place, joined
from neox_jax.errors import InputError
from neox_jax.evaluate import check_tokenizer, open_fitting
from neox_jax.generation import generate
from neox_jax.metrics import Progress
from neox_jax.model import NeoX
from neox_jax.scoring import RequestError, score_continuations
from neox_jax.sharding import make_mesh
from neox_jax.tokenizer import Tokenizer

MAX_GEN_TOKS = 256  # where a task does not say
BATCH_TOKENS = 8192  # of a forward pass where no batch size is given
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}  # of a task's arguments, taken as they are
ARGUMENTS = SAMPLING | {"until", "do_sample", "max_gen_toks"}
PLACE = ("distributed", "coordinator", "num_processes", "process_id")


@register_model("neox_jax")
class NeoxLM(TemplateLM):
    """A model of ours for lm_eval, by `pretrained` (a SOURCE) or as it is.

    tokenizer: where it is, if not beside the model; of a model as it is, itself. batch_size: rows of the model's whole
    context in a forward pass, or "auto". tell: called with a line before and while something takes its time, instead of
    showing progress. Every process of several does the same work on its own devices' share and reports one rank.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        model: NeoX | None = None,
        tokenizer: Tokenizer | str | None = None,
        mesh=None,
        dtype: str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        adapter: str | None = None,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        tell: Callable[[str], None] | None = None,
        max_batch_size=None,
        device=None,
    ):
        super().__init__()
        if model is None:
            tokenizer, _ = open_fitting(pretrained, tokenizer=tokenizer, revision=revision)
            options = {"dtype": dtype, "revision": revision, "quantize": quantize, "adapter": adapter}
            model = load_model(pretrained, mesh=mesh, **options)
        check_tokenizer(tokenizer, model.config)
        self.model, self.tokens = model, tokenizer
        self._all_rows = copy.copy(tokenizer)  # Hugging Face's models generate ids that have no text, too
        self._all_rows.vocab_size = model.config.vocab_size
        self.max_length = int(max_length or model.config.max_position_embeddings)
        automatic = batch_size in (None, "auto") or str(batch_size).startswith("auto")
        self.batch_tokens = BATCH_TOKENS if automatic else int(batch_size) * self.max_length
        self._source, self._tell = pretrained, tell

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "NeoxLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "NeoxLM":
        """What lm_eval's own command line makes of its --model_args.

        Beside those of `NeoxLM`: mesh as text, "data=2:model=4"; and in one of several processes distributed ("auto"),
        or coordinator, num_processes and process_id, as `neox-jax eval` has them: then the first alone has results.
        """
        place = {name: arg_dict[name] for name in PLACE if name in arg_dict}
        options = {name: value for name, value in arg_dict.items() if name not in PLACE}
        peers = _join(place, facts=options)
        if "mesh" in options:
            options["mesh"] = make_mesh(**parse_scoring_mesh(str(options["mesh"])))
        elif peers.num_processes > 1:
            options["mesh"] = make_mesh(data=-1)
        if peers.process_id > 0:
            options["tell"] = lambda line: None
        return super().create_from_arg_obj(options, additional_config)

    @property
    def eot_token_id(self) -> int:
        eos = self.tokens.eos_token_id
        return self.model.config.eos_token_id if eos is None else eos

    @property
    def tokenizer_name(self) -> str:
        return self._source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokens.encode(string)

    def get_model_info(self) -> dict:
        return {"model_num_parameters": self.model.config.num_parameters, "model_source": self._source}

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raises: InputError, before the first forward pass, naming the task of what cannot be scored."""
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        except RequestError as error:
            one = requests[error.index]
            raise InputError(f"task {one.task_name}: question {one.doc_id} has {error.reason}") from error

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        answers = self._score([(context, continuation) for _, context, continuation in requests], "log-likelihoods")
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append(window)
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._score(windows, "texts"), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Requests with the same arguments together, through the engine."""
        groups, texts = {}, [""] * len(requests)
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        progress = self._progress("generating", len(requests))
        num_done = 0
        try:
            for members in groups.values():
                arguments = self.check_arguments(requests[members[0]].args[1])
                written = self._generate([requests[i].args[0] for i in members], arguments)
                for i, text in zip(members, written, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                num_done += len(members)
                progress.update(num_done)
        finally:
            progress.close()
        return texts

    def check_arguments(self, arguments: dict) -> dict:
        """A task's generation_kwargs with all that is left to us. Raises: InputError for what cannot be done."""
        arguments = normalize_gen_kwargs(arguments, MAX_GEN_TOKS)
        if arguments.get("num_beams") == 1:
            del arguments["num_beams"]
        unknown = sorted(arguments.keys() - ARGUMENTS)
        if unknown:
            raise InputError(f"{unknown[0]} is not known for generation; known are {', '.join(sorted(ARGUMENTS))}")
        length = arguments["max_gen_toks"]
        if length >= self.max_length:
            raise InputError(f"max_gen_toks is {length}; it must be below the model's context, {self.max_length}")
        return arguments

    def _generate(self, contexts: list[str], arguments: dict) -> list[str]:
        eos = self.tokens.decode([self.eot_token_id])
        until = [one for one in handle_stop_sequences(arguments.get("until"), eos) if one]
        length = arguments["max_gen_toks"]
        options = {name: arguments[name] for name in SAMPLING & arguments.keys()}
        if not arguments.get("do_sample"):
            options["temperature"] = 0.0
        room = self.max_length - length
        prompts = [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context in contexts]
        rows = max(1, self.batch_tokens // self.max_length)
        completions = generate(
            self.model, self._all_rows, prompts, max_new_tokens=length, stop=until, batch_size=max(8, rows), **options
        )
        texts = [self.tokens.decode(one.tokens, skip_special_tokens=True) for one in completions]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _progress(self, what: str, total: int):
        if self._tell is None:
            return Progress(what, total=total, line_seconds=10)
        self._tell(what)
        return _Told(what, self._tell)

    def _score(self, pairs, what: str) -> list[tuple[float, bool]]:
        progress, done = self._progress(f"scoring {what}", len(pairs)), 0

        def count(num: int) -> None:
            nonlocal done
            done = min(done + num, len(pairs))
            progress.update(done)

        try:
            scores = score_continuations(
                self.model, pairs, batch_tokens=self.batch_tokens, max_length=self.max_length, progress=count
            )
        finally:
            progress.close()
        return [(one.logprob, one.is_greedy) for one in scores]


class _Told:
    """Progress for whoever only wants to know that there is some."""

    def __init__(self, what: str, tell: Callable[[str], None]):
        self._what, self._tell = what, tell

    def update(self, completed: int) -> None:
        self._tell(f"{self._what} ({completed})")

    def close(self) -> None:
        pass


def _join(place: dict, *, facts: dict):
    """The other processes, if this is one of several, until it ends."""
    stack = contextlib.ExitStack()
    peers = stack.enter_context(joined(find_place(**place), facts=facts))
    if peers.num_processes > 1:
        peers.end_on_signals()
        os.environ["LOCAL_RANK"] = str(peers.process_id)  # by which lm_eval knows who has results among many of rank 0
        atexit.register(_leave, stack)
    return peers


def _leave(stack: contextlib.ExitStack) -> None:
    if hasattr(sys, "last_value"):  # an error that nobody caught: the others, which wait for this one, end with it
        sys.stderr.flush()
        os._exit(1)
    stack.close()
