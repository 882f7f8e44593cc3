"""Compare llama.cpp with transformers on the same weights by next-token log-probabilities of one frame."""

from typing import TYPE_CHECKING, Any

from orion_triage.errors import ParityError
from orion_triage.imagery.frames import Frame
from orion_triage.models.encode import encode, render_turn
from orion_triage.models.family import family_of_processor

if TYPE_CHECKING:
    from orion_triage.llama_cpp.client import Client

LARGEST_DIFFERENCE = 0.01  # measured: 0.0026 at the 1.6B's shapes, F16 against float32
CANDIDATES = 5


def largest_difference(model: Any, processor: Any, client: "Client", frame: Frame, user_text: str) -> float:
    """The largest difference of log-probabilities between server and model over the server's five most likely tokens.

    Raises ParityError if the two render the prompt differently or read a different number of tokens, because then their
    prompt or image differs.
    """
    import torch

    rendered = render_turn(processor, user_text).removeprefix(processor.tokenizer.bos_token or "")
    if rendered != (sent := client.chat(user_text, processor.image_token)):
        raise ParityError(
            f"the chat template renders {rendered[:60]!r}..., but llama.cpp gets {sent[:60]!r}....",
            f"Use a base model with the {family_of_processor(processor).NAME} chat template.",
            "another prompt",
        )
    # The grammar keeps the answer of an untrained model printable (else the server replies 500). It does not affect
    # the probabilities, which are computed before it.
    reply = client.completion(user_text, frame.png(), 1, n_probs=CANDIDATES, grammar="root ::= [a-z]+")
    batch = encode(processor, [frame.image], [user_text]).to(model.device)
    length = batch["input_ids"].shape[1]
    if reply["tokens_evaluated"] != length:
        raise ParityError(
            f"llama.cpp reads {reply['tokens_evaluated']} tokens, but transformers reads {length}: the prompt or the "
            "frame size differs.",
            "Do not deploy this pair; report the base and the versions.",
            f"{reply['tokens_evaluated']} tokens read instead of {length}",
        )
    with torch.inference_mode():
        logits = model(**batch, logits_to_keep=1, use_cache=False).logits[0, -1]
    expected = logits.float().log_softmax(-1)
    return max(
        abs(float(candidate["logprob"]) - float(expected[candidate["id"]]))
        for candidate in reply["completion_probabilities"][0]["top_logprobs"]
    )
