r"""Three families of the reasoning stages, small enough for a model of under a million parameters.

Each has the semantics of the reasoning-gym generator of the same name, in a wording short enough
for a tokenizer of 512 entries. They are drawn here and not by reasoning-gym because its settings
cannot keep partial sums in a range, nor ask for distinct problems; its verifiers judge the answers
(`solutions.check`) and its own problems are solved in the tests. Answers are given as \boxed{...}.

Distinct problems by difficulty, both sides of the split:

| family          | difficulty                     | range | problems, lowest difficulty first |
|-----------------|--------------------------------|-------|------------------------------|
| chain_sum       | terms                          | 3..8  | 9^difficulty, 729 and up     |
| base_conversion | bits (decimal), pairs (base 4) | 3..6  | 36, 136, 528, 2,048          |
| number_sorting  | digits to sort                 | 4..7  | 9^difficulty, 6,561 and up   |
"""

import random

from q3mega.data.tasks.base import Problem, family, problem

MAX_PARTIAL_SUM = 9
MAX_BITS_TO_DECIMAL = 5


@family("chain_sum", capability="reasoning", difficulties=range(3, 9))
def chain_sum(rng: random.Random, terms: int) -> Problem:
    """'What is 5-1-3+8?': digits, every partial sum a digit. meta: numbers, signs."""
    total = rng.randint(1, 9)
    numbers, signs = [total], ["+"]
    while len(numbers) < terms:
        number, sign = rng.randint(1, 9), rng.choice("+-")
        partial = total + number if sign == "+" else total - number
        if 0 <= partial <= MAX_PARTIAL_SUM:
            total = partial
            numbers.append(number)
            signs.append(sign)
    text = "".join(f"{s}{n}" for s, n in zip(signs, numbers, strict=True))[1:]
    meta = {"numbers": numbers, "signs": signs}
    return problem("chain_sum", "reasoning", f"What is {text}?", str(total), terms, meta=meta)


@family("base_conversion", capability="reasoning", difficulties=range(3, 7))
def base_conversion(rng: random.Random, lines: int) -> Problem:
    """'What is binary 10110 in decimal?', or 'in base 4?' with two bits a line. meta: bits, base.

    Numbers of up to five bits are too few (30) for a run, so half the draws ask for base 4.
    """
    base = rng.choice((10, 4)) if lines <= MAX_BITS_TO_DECIMAL else 4
    length = lines if base == 10 else 2 * lines
    value = rng.randrange(2 ** (length - 1), 2**length)
    answer = (
        str(value) if base == 10 else "".join(str(value >> 2 * i & 3) for i in range(lines))[::-1]
    )
    name = "decimal" if base == 10 else "base 4"
    question = f"What is binary {value:b} in {name}?"
    meta = {"bits": f"{value:b}", "base": base}
    return problem("base_conversion", "reasoning", question, answer, lines, meta=meta)


@family("number_sorting", capability="reasoning", difficulties=range(4, 8))
def number_sorting(rng: random.Random, count: int) -> Problem:
    """'Sort 7 3 9 1.': digits 1..9, ascending, repeats allowed. meta: numbers."""
    numbers = rng.choices(range(1, 10), k=count)
    question = f"Sort {' '.join(map(str, numbers))}."
    answer = " ".join(map(str, sorted(numbers)))
    return problem(
        "number_sorting", "reasoning", question, answer, count, meta={"numbers": numbers}
    )
