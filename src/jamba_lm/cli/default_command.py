"""Groups of commands of which one is meant when none is named."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def unless_named(default: str) -> type[TyperGroup]:
    """Return a group that takes `jamba GROUP THING` as `jamba GROUP DEFAULT THING`."""

    class Group(TyperGroup):
        """Puts the name of the default command first, where another is not."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            known = {*self.commands, *ctx.help_option_names}
            if args and args[0] not in known:
                args = [default, *args]
            return super().parse_args(ctx, args)

    return Group
