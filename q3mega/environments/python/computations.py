"""Computations for a program: a question, a draw of its numbers, and the function that solves it.

A function uses only the imports of this module, so that its source runs alone.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Computation:
    """solve(**draw(rng)) answers the questions with the same in them."""

    solve: Callable[..., int | str]
    draw: Callable[[random.Random], dict[str, Any]]
    questions: tuple[str, ...]


def sum_of_multiples(a: int, b: int, n: int) -> int:
    """Sum of the whole numbers below n that a or b divides."""
    return sum(i for i in range(n) if i % a == 0 or i % b == 0)


def digit_sum_of_power(a: int, n: int) -> int:
    """Sum of the decimal digits of a**n."""
    return sum(map(int, str(a**n)))


def primes_between(low: int, high: int) -> int:
    """Number of primes from low to high, both included."""
    sieve = bytearray([1]) * (high + 1)
    for i in range(2, int(high**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, high + 1, i)))
    return sum(sieve[low : high + 1])


def longest_collatz(n: int) -> int:
    """Start from 1 to n with the most Collatz steps; the smallest of several."""

    def steps(i: int) -> int:
        count = 0
        while i != 1:
            i, count = (i // 2 if i % 2 == 0 else 3 * i + 1), count + 1
        return count

    return max(range(1, n + 1), key=lambda i: (steps(i), -i))


def modular_recurrence(a: int, b: int, start: int, m: int, n: int) -> int:
    """x_n of x_0 = start, x_(k+1) = (a x_k^2 + b) mod m."""
    x = start
    for _ in range(n):
        x = (a * x * x + b) % m
    return x


def days_between(first: str, last: str) -> int:
    """Days from one ISO date to another."""
    return (date.fromisoformat(last) - date.fromisoformat(first)).days


def date_after(first: str, n: int) -> str:
    """ISO date n days after another."""
    return (date.fromisoformat(first) + timedelta(days=n)).isoformat()


def fridays_the_13th(low: int, high: int) -> int:
    """Number of Fridays the 13th in the years low to high, both included."""
    years, months = range(low, high + 1), range(1, 13)
    return sum(date(y, m, 13).weekday() == 4 for y in years for m in months)


def last_in_circle(n: int, k: int) -> int:
    """Who is left of 1 to n when every k-th leaves (Josephus)."""
    circle, position = list(range(1, n + 1)), 0
    while len(circle) > 1:
        position = (position + k - 1) % len(circle)
        circle.pop(position)
    return circle[0]


def commonest_letter_count(text: str) -> int:
    """Occurrences of the commonest letter, case kept."""
    return max(Counter(c for c in text if c.isalpha()).values())


def shifted_and_turned(word: str, shift: int) -> str:
    """Caesar's shift of a word, reversed."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    moved = (letters[(letters.index(c) + shift) % 26] for c in word)
    return "".join(moved)[::-1]


def read_aloud(start: int, n: int) -> int:
    """Length of the look-and-say line n steps after start."""
    line = str(start)
    for _ in range(n):
        spoken, i = "", 0
        while i < len(line):
            j = i
            while j < len(line) and line[j] == line[i]:
                j += 1
            spoken, i = f"{spoken}{j - i}{line[i]}", j
        line = spoken
    return len(line)


def longest_rise(numbers: list[int]) -> int:
    """Length of the longest strictly rising subsequence."""
    best: list[int] = []
    for i, x in enumerate(numbers):
        best.append(1 + max((best[j] for j in range(i) if numbers[j] < x), default=0))
    return max(best)


def squares_sum_of_middle(numbers: list[int], k: int) -> int:
    """Sum of squares without the k smallest and the k largest numbers."""
    return sum(x * x for x in sorted(numbers)[k:-k])


def rabbits(young: int, pairs: int, years: int, every: int, sold: int) -> int:
    """Rabbits after some years; every so often some of the old ones are sold."""
    old = 0
    for year in range(1, years + 1):
        young, old = pairs * old, old + young
        if year % every == 0:
            old = max(0, old - sold)
    return young + old


def visited_cells(a: int, c: int, m: int, start: int, n: int) -> int:
    """Different cells of a walk whose turns a linear congruential generator draws."""
    x, y, seen, state = 0, 0, {(0, 0)}, start
    for _ in range(n):
        state = (a * state + c) % m
        dx, dy = ((0, 1), (1, 0), (0, -1), (-1, 0))[state % 4]
        x, y = x + dx, y + dy
        seen.add((x, y))
    return len(seen)


def ways_to_pay(amount: int, coins: list[int]) -> int:
    """Ways to pay an amount with coins of these values."""
    ways = [1] + [0] * amount
    for coin in coins:
        for total in range(coin, amount + 1):
            ways[total] += ways[total - coin]
    return ways[amount]


def _day(rng: random.Random, low: int, high: int) -> str:
    return date(rng.randint(low, high), rng.randint(1, 12), rng.randint(1, 28)).isoformat()


def _text(rng: random.Random) -> str:
    weights = [rng.random() for _ in _LETTERS]
    return " ".join("".join(rng.choices(_LETTERS, weights, k=rng.randint(3, 9))) for _ in range(40))


COMPUTATIONS = {
    spec.solve.__name__: spec
    for spec in (
        Computation(
            sum_of_multiples,
            lambda r: {"a": r.randint(3, 19), "b": r.randint(20, 47), "n": r.randint(5000, 90000)},
            ("What is the sum of all positive whole numbers below {n} that {a} or {b} divides?",
             "Add up every positive integer smaller than {n} that is a multiple of {a} or of {b}."),
        ),
        Computation(
            digit_sum_of_power,
            lambda r: {"a": r.randint(3, 99), "n": r.randint(60, 400)},
            ("What is the sum of the decimal digits of {a}^{n}?",
             "Write {a} to the power of {n} in decimal and add its digits. What comes out?"),
        ),
        Computation(
            primes_between,
            lambda r: {"low": r.randint(1000, 9000), "high": r.randint(20000, 90000)},
            ("How many primes are there from {low} to {high}, both included?",
             "Count the prime numbers p with {low} <= p <= {high}."),
        ),
        Computation(
            longest_collatz,
            lambda r: {"n": r.randint(300, 9000)},
            ("From a number i the Collatz rule goes to i/2 if i is even, else to 3i+1, until it is "
             "1. Which start from 1 to {n} takes the most steps (the smallest of several)?",),
        ),
        Computation(
            modular_recurrence,
            lambda r: {"a": r.randint(2, 40), "b": r.randint(1, 99), "start": r.randint(2, 50),
                       "m": r.randint(1000, 9999), "n": r.randint(50, 900)},
            ("Let x_0 = {start} and x_(k+1) = ({a} * x_k^2 + {b}) mod {m}. What is x_{n}?",
             "Start with {start}. {n} times, replace x by the remainder of {a}*x*x + {b} divided "
             "by {m}. Where does it end?"),
        ),
        Computation(
            days_between,
            lambda r: {"first": _day(r, 1700, 1900), "last": _day(r, 1901, 2090)},
            ("How many days after {first} is {last} (Gregorian calendar, YYYY-MM-DD)?",
             "A clock that counts days starts at 0 on {first}. What does it show on {last}? Both "
             "dates are Gregorian, as YYYY-MM-DD."),
        ),
        Computation(
            date_after,
            lambda r: {"first": _day(r, 1800, 2020), "n": r.randint(900, 60000)},
            ("Which date is {n} days after {first}? Write it as YYYY-MM-DD.",
             "Something happened on {first}, and something else {n} days later. On which date was "
             "that, as YYYY-MM-DD?"),
        ),
        Computation(
            fridays_the_13th,
            lambda r: {"low": r.randint(1800, 1899), "high": r.randint(1900, 2090)},
            ("How many times was the 13th of a month a Friday from the start of {low} to the end "
             "of {high}?",
             "Count the Fridays the 13th in the years {low} to {high}, both included."),
        ),
        Computation(
            last_in_circle,
            lambda r: {"n": r.randint(40, 900), "k": r.randint(3, 40)},
            ("People numbered 1 to {n} stand in a circle. Starting at number 1 they count from 1 "
             "to {k} over and over, and whoever says {k} leaves, until one is left. Which number "
             "has the last one?",),
        ),
        Computation(
            commonest_letter_count,
            lambda r: {"text": _text(r)},
            ("How often does the commonest letter occur in this text?\n{text}\n",
             "Count each letter of the line below. What is the highest count?\n{text}\n"),
        ),
        Computation(
            shifted_and_turned,
            lambda r: {"word": "".join(r.choices(_LETTERS, k=r.randint(25, 45))),
                       "shift": r.randint(2, 24)},
            ("Move every letter of {word} on by {shift} places in the alphabet, from z back to a, "
             "then reverse the whole. What is the result, in small letters?",),
        ),
        Computation(
            read_aloud,
            lambda r: {"start": r.randint(1, 9999), "n": r.randint(12, 28)},
            ("A line of digits is read aloud and written down: 112 becomes 2112 (two 1s, one 2). "
             "Starting from {start}, how many digits has the line after {n} such steps?",),
        ),
        Computation(
            longest_rise,
            lambda r: {"numbers": [r.randint(1, 999) for _ in range(r.randint(40, 70))]},
            ("How long is the longest strictly increasing subsequence, not necessarily of "
             "neighbours, of {numbers}?",),
        ),
        Computation(
            squares_sum_of_middle,
            lambda r: {"numbers": [r.randint(1, 9999) for _ in range(r.randint(30, 50))],
                       "k": r.randint(3, 9)},
            ("Leave out the {k} smallest and the {k} largest of these numbers. What is the sum of "
             "the squares of the others? {numbers}",),
        ),
        Computation(
            rabbits,
            lambda r: {"young": r.randint(2, 30), "pairs": r.randint(2, 5),
                       "years": r.randint(12, 30), "every": r.randint(3, 6),
                       "sold": r.randint(10, 90)},
            ("A breeder has {young} young animals and no grown ones. Each year every grown animal "
             "has {pairs} young, while last year's young grow up. At the end of each year whose "
             "number {every} divides, counting from 1, {sold} grown animals are sold, or all if "
             "there are fewer. How many animals, young and grown, are there after {years} years?",),
        ),
        Computation(
            visited_cells,
            lambda r: {"a": 4 * r.randint(20, 90) + 1, "c": 2 * r.randint(10, 400) + 1,
                       "m": r.randint(5000, 99999), "start": r.randint(1, 999),
                       "n": r.randint(200, 3000)},
            ("A robot stands at (0, 0). Its state starts at {start}; before each move it becomes "
             "({a} * state + {c}) mod {m}, and state mod 4 says where to: 0 adds (0, 1), 1 adds "
             "(1, 0), 2 adds (0, -1), 3 adds (-1, 0). How many different cells has it been on "
             "after {n} moves, the first one included?",),
        ),
        Computation(
            ways_to_pay,
            lambda r: {"amount": r.randint(150, 900),
                       "coins": sorted(r.sample(range(2, 60), r.randint(4, 7)))},
            ("In how many ways can {amount} be paid with coins of {coins}, each as often as you "
             "like, when the order does not matter?",),
        ),
    )
}  # fmt: skip
