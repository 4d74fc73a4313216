"""Checks of untrusted chat templates, in a process that can be killed.

A template is a program: it may never end, or produce a text that fills the memory. Jinja's sandbox
bounds ``range`` and hides Python's internals, but limits neither time nor memory.
"""

from __future__ import annotations

import functools

from loram_ray.utils.trial_process import run_apart

CPU_SECONDS = 2
MAX_CHARACTERS = 2**20
"""Maximum length of a template, and of its rendering of a conversation of four messages."""
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
            print("a template that needs less memory")
            sys.exit()
        except Exception:
            continue
        if len(text) > most:
            print(f"a template that adds at most {most:,} characters to four messages")
            sys.exit()
"""


@functools.lru_cache(maxsize=64)
def fault_of_template(template: str) -> str | None:
    """Return the requirement that a chat template violates, or None.

    Exceptions that the template raises are not faults. It may reject conversations, and each such
    error is reported when the conversation is rendered.
    """
    if len(template) > MAX_CHARACTERS:
        return f"at most {MAX_CHARACTERS:,} characters long, got {len(template):,}"
    done = run_apart(_PROGRAM, [template, CPU_SECONDS, _BYTES, MAX_CHARACTERS])
    if done is None or done.returncode < 0:
        return f"a template that renders four messages within {CPU_SECONDS} s"
    if done.returncode:  # out of memory where Python cannot raise
        return "a template that needs less memory"
    return done.stdout.decode().strip() or None
