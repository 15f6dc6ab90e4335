"""Composition of operators: one after the other on the template, each step masked anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from kvopt.mutate.operator import Operator
from kvopt.mutate.spans import mask
from kvopt.mutate.validity import Scope, editable_lengths
from kvopt.task.template import Template


def apply_operator(
    operator: Operator, template: Template, scope: Scope, protect: Sequence[re.Pattern[str]], rng: Random
) -> Template | None:
    """``template`` with one field changed by ``operator``, or None when it applies to none. Raises MarkError for an
    operator with a fault.
    """
    lengths = editable_lengths(template, scope)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i] * rng.random())
    for i in order:
        field = mask(template.fields[i], lengths[i], protect)
        changed = operator.apply(field, rng) if field.editable else None
        if changed is None or changed == field.text:
            continue
        sources = list(template.fields)
        sources[i] = field.unmask(changed)
        return template.with_fields(sources)
    return None


def compose(
    template: Template,
    chosen: Sequence[Operator],
    lead: str | None,
    depth: int,
    scope: Scope,
    protect: Sequence[re.Pattern[str]],
    rng: Random,
) -> tuple[Template, tuple[str, ...]]:
    """Apply up to ``depth`` different operators, the first of family ``lead`` if one applies; each step must give a
    text not seen on the way.
    """
    current, names, passed = template, list[str](), {template.fields}
    for step in range(depth):
        order = rng.sample(list(chosen), len(chosen))
        if step == 0 and lead:
            order.sort(key=lambda operator: operator.family != lead)
        for operator in order:
            if operator.name in names:
                continue
            changed = apply_operator(operator, current, scope, protect, rng)
            if changed is not None and changed.fields not in passed:
                current = changed
                passed.add(changed.fields)
                names.append(operator.name)
                break
    return current, tuple(names)
