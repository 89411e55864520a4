r"""Three families of the reasoning stages, small enough for a model of under a million parameters.

Two have the semantics of the reasoning-gym generator of the same name, in a wording short enough
for a tokenizer of 512 entries. They are drawn here and not by reasoning-gym because its settings
cannot keep partial sums in a range, nor ask for distinct problems; its verifier judges the sums
(`solutions.check`) and its own problems are solved in the tests. Answers are given as \boxed{...}.
Modular arithmetic is not among its generators. What the three share: a line of the work needs no
more than the line above and one item of the question, and few facts serve all lines of a family.

Distinct problems by difficulty, both sides of the split:

| family          | difficulty     | range | problems, lowest difficulty first |
|-----------------|----------------|-------|-----------------------------------|
| chain_sum       | terms          | 5..12 | 9^difficulty, 59,049 and up       |
| modular_product | factors        | 5..12 | 7^difficulty, 16,807 and up       |
| number_sorting  | digits to sort | 3..6  | 9^difficulty, 729 and up          |
"""

import math
import random

from q3mega.problems.base import FAMILIES, Problem, family, problem

MAX_PARTIAL_SUM = 9
FACTORS = (2, 3, 4, 6, 7, 8, 9)


@family("chain_sum", capability="reasoning", difficulties=range(5, 13))
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


@family("modular_product", capability="reasoning", difficulties=range(5, 13))
def modular_product(rng: random.Random, factors: int) -> Problem:
    """'What is 7*8*3 mod 10?', the last digit of the product. meta: numbers.

    Without 5, whose products end in 0 or 5 whatever comes before.
    """
    numbers = rng.choices(FACTORS, k=factors)
    answer = str(math.prod(numbers) % 10)
    question = f"What is {'*'.join(map(str, numbers))} mod 10?"
    meta = {"numbers": numbers}
    return problem("modular_product", "reasoning", question, answer, factors, meta=meta)


@family("number_sorting", capability="reasoning", difficulties=range(3, 7))
def number_sorting(rng: random.Random, count: int) -> Problem:
    """'Sort 7 3 9 1.': digits 1..9, ascending, repeats allowed. meta: numbers."""
    numbers = rng.choices(range(1, 10), k=count)
    question = f"Sort {' '.join(map(str, numbers))}."
    answer = " ".join(map(str, sorted(numbers)))
    return problem(
        "number_sorting", "reasoning", question, answer, count, meta={"numbers": numbers}
    )


REASONING = tuple(name for name, spec in FAMILIES.items() if spec.capability == "reasoning")
