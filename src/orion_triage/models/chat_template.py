"""Chat templates of strangers: small programs, tried out in a process of their own before this one renders them.

transformers renders in Jinja's sandbox, which keeps a template from files, modules and attributes with underscores,
but not from using up all time and memory. So an unknown template is rendered once under limits first.
"""

import functools
import json
import subprocess
import sys

from orion_triage.errors import OrionError

LARGEST_TEMPLATE = 100_000  # characters; LFM2's have up to 3,000
LONGEST_TEXT = 1_000_000  # characters that one turn may become
LIMIT_SECONDS = 10  # of computing, importing transformers' renderer included (0.7 s)
LIMIT_BYTES = 1_000_000_000  # of address space; the renderer takes 0.3 GB of it
_OUT_OF_PATIENCE_SECONDS = 120  # of waiting, on a machine that is busy with other things

_CHILD = """
import json, resource, sys
seconds, size, longest = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
given = json.load(sys.stdin)
from transformers.utils.chat_template_utils import render_jinja_template
try:
    (text,), _ = render_jinja_template(
        conversations=[given["messages"]], chat_template=given["template"], add_generation_prompt=True,
        bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>",
    )
    answer = "" if len(text) <= longest else f"it makes {len(text):,} characters of one turn"
except BaseException as error:
    answer = f"{type(error).__name__}: {str(error)[:200]}"
sys.stdout.write(json.dumps(answer))
"""


@functools.cache
def check(template: str, place: str) -> None:
    """Raise OrionError unless the template renders a turn within seconds, a gigabyte and without an error.

    `place` is named in the error. A template that is text for text the shipped base's is not tried: it is known.
    """
    from orion_triage.models.lfm2_vl import CHAT_TEMPLATE

    if template == CHAT_TEMPLATE:
        return
    fix = "Copy chat_template.jinja from the base model."
    if len(template) > LARGEST_TEMPLATE:
        raise OrionError(f"{place}: the chat template has {len(template):,} characters.", fix)
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is there?"}]
    given = json.dumps({"template": template, "messages": [{"role": "user", "content": content}]})
    command = [sys.executable, "-I", "-c", _CHILD, str(LIMIT_SECONDS), str(LIMIT_BYTES), str(LONGEST_TEXT)]
    try:
        child = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_OUT_OF_PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OrionError(f"{place}: the chat template does not come to an end.", fix) from None
    if child.returncode < 0:
        raise OrionError(f"{place}: the chat template takes more than {LIMIT_SECONDS} s to render a turn.", fix)
    try:
        fault = json.loads(child.stdout)
    except ValueError:
        fault = (child.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
    if fault:
        raise OrionError(f"{place}: the chat template cannot be rendered: {fault}.", fix)
