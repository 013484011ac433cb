"""`terrace completion bash|zsh`: a script that completes commands, options, their choices and the names of shipped recipes.

Made from the commands' own parsers, so that nothing has to be kept in step: `source <(terrace completion bash)` in ~/.bashrc.
"""

from __future__ import annotations

import argparse
import shlex

SHELLS = ("bash", "zsh")
# zsh runs functions of bash's completion through its own adapter, so both shells share one script.
ADAPTER = """\
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""
HEADS = {"bash": "", "zsh": ADAPTER}
FUNCTION = """\
_terrace() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} words= files=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words=@COMMANDS@
  else
    case "$command" in
@CASES@
    esac
    case "$command $before" in
@CHOICES@
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [ -n "$files" ]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _terrace terrace
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script for the shell's completion; `source <(terrace completion bash)` uses it at once.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(main=print_script)


def print_script(arguments: argparse.Namespace) -> int:
    print(script(arguments.shell), end="")
    return 0


def script(shell: str) -> str:
    """The whole script for one shell."""
    from terrace.command_reference import parsers

    by_name = parsers()
    cases = [f"      {name}) words={shlex.quote(' '.join(_words(parser)))}; files=1 ;;" for name, parser in by_name.items()]
    choices = [
        f"      {shlex.quote(f'{name} {option}')}) words={shlex.quote(' '.join(map(str, action.choices)))}; files= ;;"
        for name, parser in by_name.items()
        for action in parser._actions
        for option in action.option_strings
        if action.choices is not None
    ]
    filled = FUNCTION.replace("@COMMANDS@", shlex.quote(" ".join(by_name)))
    filled = filled.replace("@CASES@", "\n".join(cases)).replace("@CHOICES@", "\n".join(choices))
    return f"# Completion of `terrace` for {shell}.\n{HEADS[shell]}{filled}"


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand on the command line of one command: options, choices of its arguments, names of recipes."""
    from terrace.recipe import shipped

    words = [option for action in parser._actions for option in action.option_strings if action.help != argparse.SUPPRESS]
    for action in parser._actions:
        if not action.option_strings and action.choices is not None:
            words += map(str, action.choices)
    takes_recipe = any(action.dest == "recipe" or action.metavar == "NAME" for action in parser._actions if not action.option_strings)
    return words + (shipped.names() if takes_recipe else [])
