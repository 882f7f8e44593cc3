"""Check third-party chat templates, which are small programs, in a separate process with limits.

transformers renders them in Jinja's sandbox. It blocks files, modules and attributes with underscores, but does not
limit time and memory. An unknown template is therefore first rendered once with limits.
"""

import functools
import json
import subprocess
import sys

from orion_triage.errors import OrionError

LARGEST_TEMPLATE = 100_000  # characters; the known families' have up to 3,000
LONGEST_TEXT = 1_000_000  # characters of one rendered turn
LIMIT_SECONDS = 10  # of CPU time, including 0.7 s to import transformers' renderer
LIMIT_BYTES = 1_000_000_000  # of address space; the renderer takes 0.3 GB
_TIMEOUT_SECONDS = 120  # of wall time, for a busy machine

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
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
    )
    answer = "" if len(text) <= longest else f"one turn has {len(text):,} characters; the limit is {longest:,}"
except BaseException as error:
    answer = f"{type(error).__name__}: {str(error)[:200]}"
sys.stdout.write(json.dumps(answer))
"""


@functools.cache
def check(template: str, place: str) -> None:
    """Raise OrionError unless the template renders one turn within LIMIT_SECONDS and LIMIT_BYTES.

    The error names `place`.
    """
    fix = "Copy chat_template.jinja from the base model."
    if len(template) > LARGEST_TEMPLATE:
        raise OrionError(
            f"{place}: the chat template has {len(template):,} characters; the limit is {LARGEST_TEMPLATE:,}.", fix
        )
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is there?"}]
    given = json.dumps({"template": template, "messages": [{"role": "user", "content": content}]})
    command = [sys.executable, "-I", "-c", _CHILD, str(LIMIT_SECONDS), str(LIMIT_BYTES), str(LONGEST_TEXT)]
    try:
        child = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OrionError(
            f"{place}: the chat template did not finish rendering a turn within {_TIMEOUT_SECONDS} s.", fix
        ) from None
    if child.returncode < 0:
        raise OrionError(f"{place}: the chat template takes more than {LIMIT_SECONDS} s to render a turn.", fix)
    try:
        fault = json.loads(child.stdout)
    except ValueError:
        fault = (child.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
    if fault:
        raise OrionError(f"{place}: the chat template cannot be rendered: {fault}.", fix)
