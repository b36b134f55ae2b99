"""Vision-language models behind OpenAI's chat API as rewards: vLLM, SGLang, Ollama, or a service."""

import asyncio
import hashlib
import logging
import math
import os
import re
import string
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
from datasets import Dataset
from torch import Tensor

from .base import PASSED, Reward
from .remote import check_address, json_of, limits, png_base64, post, quoted
from .vlm_questions import QUESTIONS, NumberQuestion, Question, geneval_questions

logger = logging.getLogger(__name__)

URL, MODEL, KEY = "VLM_URL", "VLM_MODEL", "VLM_API_KEY"
MOST_LIKELY = 20  # tokens whose probabilities are asked for, the most that the API gives
LEAST_MASS = 0.1  # the probability of all answers together, below which there is no score


@dataclass
class Cost:
    """What a judge has cost so far, in this process.

    Attributes:
        questions: Asked of the server.
        remembered: Answered from memory.
        question_tokens: As the server counts them, pictures included.
        answer_tokens: The same.
    """

    questions: int = 0
    remembered: int = 0
    question_tokens: int = 0
    answer_tokens: int = 0


class VLMJudge(Reward):
    """A vision-language model that answers a question about picture and prompt: 0 to 1. Not differentiable.

        vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8001
        VLM_URL=http://127.0.0.1:8001/v1 VLM_MODEL=Qwen/Qwen2.5-VL-7B-Instruct \
            flowrl ac_flow --reward_funcs vlm_judge --critic none

    An answer that is none, such as prose, two numbers or one that is out of range, is None, and a log line quotes the
    first of each call. A picture with a value that is not finite is not sent; its score is NaN. A server that is away
    is waited for, as by `RemoteReward`; one that refuses the question, or whose answer is no chat, ends the run.

    Fooled by text that is drawn into the picture, and by whatever the model likes to see; judge with another model.
    The judge's `cost` counts questions and tokens; `NAME_tokens` is logged, per picture.

    Args:
        url: The address of the API, such as "http://127.0.0.1:8001/v1"; None for the environment variable VLM_URL.
        model: The model's name at the server; None for VLM_MODEL.
        question: One of "alignment", "aesthetics" and "unified_reward", a `Question`, or a text that asks for a number
            from 0 to 9 and has `{prompt}` and columns of the data set in braces.
        answer: "number" reads the answer. "expected" takes the mean of the possible answers, weighted by the
            probabilities of their tokens, which tells pictures apart that get the same number; the server must give
            `top_logprobs`, and the answer must be one token.
        name: The name of the reward in logs.
        token: The API key; None for VLM_API_KEY, and none where that is not set. No log, error or file shows it.
        concurrency: How many questions may wait at a time.
        timeout: Seconds that one try of a question may take.
        retries: How often to repeat a question that timed out or got a 5xx answer.
        patience: Seconds to wait for a server that cannot be reached or answers 429, 502, 503 or 504.
        memory: How many answers to remember: the same picture and question are not asked again.

    Raises:
        ValueError: If an argument is missing or out of its range.
    """

    name = "vlm_judge"
    differentiable = False

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        question: str | Question = "alignment",
        *,
        answer: Literal["number", "expected"] = "number",
        name: str | None = None,
        token: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        patience: float = 600.0,
        memory: int = 100_000,
    ) -> None:
        url = _given(url, "url", URL)
        check_address(url)
        if answer not in ("number", "expected"):
            raise ValueError(f"`answer` ({answer!r}) must be 'number' or 'expected'.")
        bounds = (("concurrency", concurrency, 1), ("retries", retries, 0), ("patience", patience, 0))
        for argument, value, least in (*bounds, ("memory", memory, 0)):
            if not value >= least:
                raise ValueError(f"`{argument}` ({value}) must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` ({timeout}) must be above 0.")
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", _given(model, "model", MODEL)
        self.question = self._checked(question, answer)
        self.name = name or self.name
        self.answer, self.concurrency, self.memory = answer, concurrency, memory
        self.timeout, self.retries, self.patience = timeout, retries, patience
        self.cost = Cost()
        self._token = _checked_key((os.environ.get(KEY) or None) if token is None else token)
        self._remembered: OrderedDict[bytes, float | None] = OrderedDict()

    def needed_columns(self) -> list[str]:
        """Those in braces in the question."""
        fields = _fields(self.question.text)
        return [name for name in dict.fromkeys(re.split(r"[.\[]", field)[0] for field in fields) if name != "prompt"]

    def check_rows(self, rows: Dataset) -> None:
        for row in rows.select_columns(["prompt", *self.needed_columns()]):
            prompt = row.pop("prompt")
            try:
                self.questions(prompt, row)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"`question` ({self.question.text!r}) cannot be filled in for the prompt {prompt!r} ({error}): "
                    "mend what stands in its braces, or the row."
                ) from error

    def __call__(
        self,
        /,
        images: Tensor,
        prompts: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Awaitable[list[float | None]]:
        rows = {name: values for name, values in columns.items() if name not in PASSED}
        asked = [
            self.questions(prompt, {name: values[i] for name, values in rows.items()})
            for i, prompt in enumerate(prompts)
        ]
        # The coroutine runs later: a copy in it would wait for all that the trainer has asked of the device by then.
        return self._scores(images.cpu(), asked, log_metric)

    def questions(self, prompt: str, columns: Mapping[str, Any]) -> list[tuple[Question, str]]:
        """What is asked about a picture, filled in; its score is the mean of the answers' scores.

        Args:
            prompt: Of the picture.
            columns: Of its row.
        """
        return [(self.question, self.question.text.format(prompt=prompt, **columns))]

    async def _scores(
        self,
        images: Tensor,
        asked: list[list[tuple[Question, str]]],
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        before = self.cost.question_tokens + self.cost.answer_tokens
        unusable: list[str] = []
        turns = asyncio.Semaphore(self.concurrency)
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        # A client belongs to one event loop.
        async with httpx2.AsyncClient(timeout=limits(self.timeout), headers=headers) as client:

            async def score(image: Tensor, questions: list[tuple[Question, str]]) -> float | None:
                if not image.isfinite().all():
                    return math.nan
                async with turns:
                    picture = await asyncio.to_thread(png_base64, image)
                    scores = [await self._ask(client, picture, *question, unusable) for question in questions]
                given = [value for value in scores if value is not None]
                return sum(given) / len(given) if scores and len(given) == len(scores) else None

            scores = await asyncio.gather(*(score(*pair) for pair in zip(images, asked, strict=True)))
        if unusable:
            logger.warning(
                "Reward %r: %d answers cannot be used, and their pictures get no score: %s",
                self.name,
                len(unusable),
                unusable[0],
            )
        if log_metric is not None and len(images):
            tokens = self.cost.question_tokens + self.cost.answer_tokens - before
            log_metric(f"{self.name}_tokens", tokens / len(images))
        return list(scores)

    async def _ask(
        self, client: httpx2.AsyncClient, picture: str, question: Question, words: str, unusable: list[str]
    ) -> float | None:
        """The score of the answer to one question.

        Args:
            client: Sends it.
            picture: The base64 of a PNG.
            question: Knows what answers are worth.
            words: Its text, filled in.
            unusable: Gets a sentence if the answer is none.
        """
        key = hashlib.sha256(f"{words}\0{picture}".encode("utf-8", "surrogatepass")).digest()
        if key in self._remembered:
            self.cost.remembered += 1
            self._remembered.move_to_end(key)
            return self._remembered[key]
        response = await post(
            client,
            self.url,
            self._body(picture, question, words),
            f"Reward {self.name!r}",
            self.retries,
            self.patience,
        )
        self.cost.questions += 1
        answer = json_of(response)
        said, likely = self._read(answer, response.text)
        self._count(answer)
        if self.answer == "expected":
            score, rule = expected_score(question, likely), f"a likely token of {question.rule()}"
        else:
            score, rule = question.score(said), question.rule()
        if score is None:
            unusable.append(f"{quoted(said, self._token)[:80]!r} is not {rule}.")
        self._remembered[key] = score
        if len(self._remembered) > self.memory:
            self._remembered.popitem(last=False)
        return score

    def _body(self, picture: str, question: Question, words: str) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": words}]}],
            "temperature": 0,  # the same picture gets the same score
            "max_tokens": question.max_tokens,
        }
        return body | ({"logprobs": True, "top_logprobs": MOST_LIKELY} if self.answer == "expected" else {})

    def _read(self, answer: Any, text: str) -> tuple[str, list[Any]]:
        """The words of an answer, and the likely first tokens with their log-probabilities where they were asked for.

        Raises `ValueError` if it is no chat.
        """
        likely: list[Any] = []
        try:
            choice = answer["choices"][0]
            said = choice["message"]["content"] or ""
            if self.answer == "expected":
                likely = choice["logprobs"]["content"][0]["top_logprobs"]
                if not likely:  # an API that knows `logprobs` alone
                    raise KeyError("top_logprobs")
        except (KeyError, IndexError, TypeError) as error:
            what = "`top_logprobs`" if self.answer == "expected" else "words"
            raise ValueError(
                f"Reward {self.name!r}: {self.url} did not answer with the {what} of a chat but "
                f"{quoted(text, self._token)[:200]!r}: does `url` name OpenAI's chat API, and `model` a model that "
                "sees pictures?"
            ) from error
        return (said if isinstance(said, str) else str(said)), likely

    def _count(self, answer: dict[str, Any]) -> None:
        match answer.get("usage"):
            case {"prompt_tokens": int(asked), "completion_tokens": int(said)}:
                self.cost.question_tokens += asked
                self.cost.answer_tokens += said

    def _checked(self, question: str | Question, answer: str) -> Question:
        if isinstance(question, str):
            if question not in QUESTIONS and not _fields(question):
                raise ValueError(
                    f"`question` ({question!r}) is none of {', '.join(QUESTIONS)} and does not mention '{{prompt}}': "
                    "write a text that does."
                )
            question = QUESTIONS[question] if question in QUESTIONS else NumberQuestion(question)
        if any(re.match(r"[.\[]|\d|$", field) for field in _fields(question.text)):
            raise ValueError(
                f"`question` ({question.text!r}) has braces without a name: write '{{prompt}}' or the name of a "
                "column in them."
            )
        several = [number for number in question.answers() if len(number) > 1 and number.isdigit()]
        if answer == "expected" and (several or (isinstance(question, NumberQuestion) and question.marker)):
            raise ValueError(
                "`answer` is 'expected', but the question's answer may take more than one token: ask for one number "
                "from 0 to 9 alone, or take 'number'."
            )
        return question


class GenEvalJudge(VLMJudge):
    """Asks for number, colour and place of the objects of a prompt: the share of yes, 0 to 1. Not differentiable.

    The objects stand in the column `include`, as in GenEval's metadata. With `answer="expected"` the probability of
    yes takes the place of yes. Arguments are those of `VLMJudge` but for `question`.
    """

    name = "geneval_judge"

    def __init__(self, url: str | None = None, model: str | None = None, **settings: Any) -> None:
        super().__init__(url, model, "alignment", **settings)

    def needed_columns(self) -> list[str]:
        """What the pictures must show."""
        return ["include"]

    def check_rows(self, rows: Dataset) -> None:
        for include in rows["include"]:
            geneval_questions(include)

    def questions(self, prompt: str, columns: Mapping[str, Any]) -> list[tuple[Question, str]]:
        """One for each property of each object."""
        return [(question, question.text.format()) for question in geneval_questions(columns["include"])]


def expected_score(question: Question, likely: Sequence[Any]) -> float | None:
    """The mean score of the answers of one token, weighted by their probabilities.

    None if the answers together are less likely than `LEAST_MASS`, our choice: the model was about to say something
    else.

    Args:
        question: Knows the answers.
        likely: Dictionaries with `token` and `logprob`, as the API gives them; the same answer may stand there in
            several spellings.
    """
    answers, total, mass = question.answers(), 0.0, 0.0
    for entry in likely:
        match entry:
            case {"token": str(token), "logprob": int() | float() as logprob} if token.strip().lower() in answers:
                weight = math.exp(logprob)
                total, mass = total + weight * answers[token.strip().lower()], mass + weight
    return total / mass if mass >= LEAST_MASS else None


def _fields(text: str) -> list[str]:
    """What stands in the braces of a question; raises `ValueError` for braces that do not match."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"`question` ({text!r}) cannot be filled in: {error}.") from error


def _given(value: str | None, argument: str, variable: str) -> str:
    value = os.environ.get(variable) if value is None else value
    if not value:
        raise ValueError(f"`{argument}` of the judge is missing: pass it, or set the environment variable {variable}.")
    return value


def _checked_key(key: str | None) -> str | None:
    """The API key, if it can stand in a header; raises `ValueError`, which does not quote it."""
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"`token` (or {KEY}) has a space, a line break or a letter that is not ASCII: copy it again.")
    return key
