"""Class scores: the same definition in transformers and llama.cpp, on the shipped base, which speaks in verdicts."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.evaluate.backends import LlamaCppBackend, TransformersBackend
from orion_triage.export import quantize
from orion_triage.imagery.frames import Frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.scoring import LabelNode, label_tree
from orion_triage.mission.verdict import CATEGORY_CUE, Verdict, answer_text, parse_verdict
from orion_triage.models import generate, lfm2_vl
from orion_triage.models.generate import answer_log_probabilities
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor
from orion_triage.settings import EvaluateSettings
from tests.conftest import MISSION

SETTINGS = EvaluateSettings()


def test_scores_are_shares_of_what_the_labels_have_together() -> None:
    answer = Answer.scored("x", [-1.0, -2.0, -3.0])
    assert answer.scores == pytest.approx((0.66524, 0.24473, 0.09003), abs=1e-5)
    assert answer.label_mass == pytest.approx(0.55300, abs=1e-5)
    assert Answer.scored("x", None) == Answer("x", None, None)


def test_labels_are_told_apart_by_their_first_token() -> None:
    one_place = (LabelNode("", (ord("H"), ord("M"), ord("L")), ((0,), (1,), (2,))),)
    assert label_tree(MISSION, lambda text: list(text.encode())) == one_place
    with pytest.raises(OrionError, match="tokenizer merges the category HIGH with the text before it"):
        label_tree(MISSION, lambda text: [sum(word.encode()) for word in text.split(" ")])  # one token for '"HIGH'
    # All names begin with the token 0, and part after it.
    first_alike = label_tree(MISSION, lambda text: [0 if chr(byte) in "HML" else byte for byte in text.encode()])
    assert first_alike == (LabelNode("H", (ord("I"), ord("E"), ord("O")), ((0,), (1,), (2,))),)


@pytest.fixture(scope="module")
def questions(drawn_questions: Any) -> tuple[list[Image.Image], list[str]]:
    """Six frames, with and without coordinates."""
    return drawn_questions(6)


@pytest.fixture(scope="module")
def of_transformers(questions: Any) -> list[Answer]:
    backend = TransformersBackend.load(TINY_BASE_FOLDER, MISSION, SETTINGS, 256)
    return backend.answer(*questions)


@pytest.fixture(scope="module")
def served(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped base's F16 pair behind a server."""
    log = tmp_path_factory.mktemp("served") / "server.log"
    tools = find_toolchain()
    with Server(tools, tiny_pair / quantize.F16, tiny_pair / quantize.MMPROJ, log=log, turn=lfm2_vl.TURN) as server:
        yield server.client


def test_scores_are_the_probabilities_of_the_whole_answer_so_far(of_transformers: Any, questions: Any) -> None:
    """Against a plain forward pass over the prompt and the answer with each label in turn."""
    import torch

    processor = load_processor(TINY_BASE_FOLDER, 256)
    model = load_model(TINY_BASE_FOLDER, dtype="float32")
    for answer, image, prompt in list(zip(of_transformers, *questions, strict=True))[:2]:
        verdict = parse_verdict(MISSION, answer.text)
        assert verdict is not None
        expected = []
        head = answer.text.partition(CATEGORY_CUE)[0] + CATEGORY_CUE
        place = len(processor.tokenizer(head, add_special_tokens=False)["input_ids"])
        for category in MISSION.names:
            text = answer_text(MISSION, Verdict(verdict.reason, category))
            scores = answer_log_probabilities(model, processor, [image], [prompt], [text])[0]
            expected.append(scores[place])
        assert answer.scores == pytest.approx(torch.stack(expected).softmax(0).tolist(), abs=1e-4)
        assert answer.label_mass == pytest.approx(float(torch.stack(expected).exp().sum()), abs=1e-4)


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_same_answers_and_scores(of_transformers: Any, questions: Any, served: Any) -> None:
    found = LlamaCppBackend(served, MISSION, max_new_tokens=SETTINGS.max_new_tokens).answer(*questions)
    assert [answer.text for answer in found] == [answer.text for answer in of_transformers]
    for ours, theirs in zip(found, of_transformers, strict=True):
        assert ours.scores is not None
        assert ours.scores == pytest.approx(theirs.scores, abs=0.01)
        assert ours.label_mass == pytest.approx(theirs.label_mass, abs=0.01)


@pytest.mark.llama_cpp
def test_a_primed_image_is_read_once_and_answers_like_a_cold_one(questions: Any, served: Any) -> None:
    images, prompts = [questions[0][0]] * 3 + [questions[0][1]], [*(3 * [questions[1][0]]), questions[1][1]]
    read: list[int] = []
    complete = served._complete
    served._complete = lambda *args, **more: (
        read.append((reply := complete(*args, **more))["timings"]["prompt_n"]) or reply
    )
    try:
        cold = LlamaCppBackend(served, MISSION, max_new_tokens=SETTINGS.max_new_tokens).answer(images, prompts)
        of_cold = read.copy()
        read.clear()
        primed = LlamaCppBackend(served, MISSION, max_new_tokens=SETTINGS.max_new_tokens, primed=True).answer(
            images, prompts
        )
    finally:
        del served._complete
    assert len(of_cold) == 8  # two requests a question
    assert len(read) == 10  # and one an image
    image_tokens = 64
    assert all(tokens > image_tokens for tokens in read[::5])
    assert read[1] < of_cold[0] - image_tokens  # no later question reads the image again
    assert read[1] == read[3] == read[5]
    for ours, theirs in zip(primed, cold, strict=True):
        assert ours.text == theirs.text
        assert ours.scores == pytest.approx(theirs.scores, abs=0.005)
    assert primed[0] == primed[1] == primed[2]  # what was asked before leaves no trace


def test_an_image_is_looked_at_once_for_all_batches_in_a_row(questions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = generate.look
    # Counted, and done as before.
    monkeypatch.setattr(generate, "look", lambda model, image: looks.append(1) or look(model, image))
    model = load_model(TINY_BASE_FOLDER, dtype="float32")
    backend = TransformersBackend(model, load_processor(TINY_BASE_FOLDER, 256), MISSION, max_new_tokens=2, batch_size=2)
    (first, second), prompts = questions[0][:2], questions[1][:2]
    for batch in ([first, first], [first, second], [second, second]):
        backend.answer(batch, prompts)
    assert len(looks) == 2


@pytest.mark.llama_cpp
def test_asking_in_two_parts_changes_no_answer(questions: Any, served: Any) -> None:
    image, prompt = questions[0][0], questions[1][0]
    whole = served.complete(prompt, Frame(image, image.size).png(), SETTINGS.max_new_tokens)
    assert (
        LlamaCppBackend(served, MISSION, max_new_tokens=SETTINGS.max_new_tokens).answer([image], [prompt])[0].text
        == whole
    )


@pytest.mark.llama_cpp
def test_an_answer_that_never_comes_to_its_category_has_no_scores(questions: Any, served: Any) -> None:
    short = LlamaCppBackend(served, MISSION, max_new_tokens=5).answer([questions[0][0]], [questions[1][0]])[0]
    assert short.text.startswith('{"reason"')
    assert short.scores is None
    processor = load_processor(TINY_BASE_FOLDER, 256)
    model = load_model(TINY_BASE_FOLDER, dtype="float32")
    backend = TransformersBackend(model, processor, MISSION, max_new_tokens=5, batch_size=1)
    assert backend.answer([questions[0][0]], [questions[1][0]])[0] == Answer(short.text)


@pytest.mark.llama_cpp
def test_the_grammar_holds_against_sampling_at_temperature_two(questions: Any, served: Any) -> None:
    # A few seeds; HYPOTHESIS_PROFILE=torture takes more.
    for seed in range(40 if os.environ.get("HYPOTHESIS_PROFILE") == "torture" else 8):
        options = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
        backend = LlamaCppBackend(served, MISSION, max_new_tokens=96, constrained=True, options=options)
        answer = backend.answer([questions[0][0]], [questions[1][0]])[0]
        verdict = parse_verdict(MISSION, answer.text)
        assert verdict is not None, answer.text
        assert answer_text(MISSION, verdict) == answer.text  # exactly the bytes of training
        assert answer.scores is not None


@pytest.mark.llama_cpp
def test_broken_bytes_are_an_unparsable_answer_and_the_server_goes_on(questions: Any, served: Any) -> None:
    image, prompt = questions[0][0], questions[1][0]
    wild = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    said = [
        LlamaCppBackend(served, MISSION, max_new_tokens=96, options=wild | {"seed": seed}).answer([image], [prompt])[0]
        for seed in range(6)
    ]
    broken = [answer for answer in said if answer.text == "[the answer is not UTF-8.]"]
    assert broken  # most of them: 96 tokens at random from a byte-level vocabulary
    assert all(parse_verdict(MISSION, answer.text) is None and answer.scores is None for answer in broken)
    assert parse_verdict(MISSION, LlamaCppBackend(served, MISSION, max_new_tokens=96).answer([image], [prompt])[0].text)
