"""Chat templates from outside, tried in a process that can be ended.

A template is a program: it may run for ever, or make a text that fills the memory. Jinja's sandbox
bounds ``range`` and hides Python's internals, and bounds neither time nor memory.
"""

from __future__ import annotations

import functools

from loram_ray.utils.trial_process import run_apart

CPU_SECONDS = 2
MAX_CHARACTERS = 2**20
"""Of a template, and of what it makes of a conversation of four messages."""
_BYTES = 2**30
_PROGRAM = """
import json, resource, sys
template, seconds, nbytes, most = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
from datetime import datetime
from jinja2.ext import Extension, loopcontrols
from jinja2.exceptions import TemplateSyntaxError
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()

def refuse(message):
    raise ValueError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False)
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
try:
    compiled = environment.from_string(template)
except TemplateSyntaxError as error:
    print(f"valid Jinja, got {error} in line {error.lineno}")
    sys.exit()
except Exception as error:
    print(f"valid Jinja, got {type(error).__name__}")
    sys.exit()
user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
system = {"role": "system", "content": "."}
for messages in ([user], [user, answer], [system, user, answer, user]):
    for prompt in (False, True):
        try:
            text = compiled.render(messages=messages, add_generation_prompt=prompt, tools=None,
                                   documents=None, bos_token="<s>", eos_token="</s>")
        except MemoryError:
            print("one that needs less memory")
            sys.exit()
        except Exception:
            continue
        if len(text) > most:
            print(f"one that writes at most {most:,} characters around four messages")
            sys.exit()
"""


@functools.lru_cache(maxsize=64)
def fault_of_template(template: str) -> str | None:
    """Return what a chat template must be and this one is not, or None.

    What it raises is no fault: it may refuse conversations, and says so of each when it comes.
    """
    if len(template) > MAX_CHARACTERS:
        return f"at most {MAX_CHARACTERS:,} characters long, got {len(template):,}"
    done = run_apart(_PROGRAM, [template, CPU_SECONDS, _BYTES, MAX_CHARACTERS])
    if done is None or done.returncode < 0:
        return f"one that renders four messages within {CPU_SECONDS} s"
    if done.returncode:  # memory that ran out where Python cannot raise
        return "one that needs less memory"
    return done.stdout.decode().strip() or None
