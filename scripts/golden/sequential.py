"""High-precision e-values and anytime bounds for the unit tests of src/stats/sequential.rs.

    pip install mpmath && python scripts/golden/sequential.py      # writes tests/golden/sequential.json

The e-value of `count` successes in `n` against every success probability up to p is the mean of the likelihood ratio
(t/p)^count ((1-t)/(1-p))^(n-count) over t of the arcsine distribution beyond p. Computed with 40 digits, written with 20.
"""
import json
import pathlib

import mpmath
from mpmath import mp

mp.dps = 40
TINY = mp.mpf(10) ** -36
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/sequential.json"


def lower_beta(x, y, a, b):
    """The integral of t^(a-1) (1-t)^(b-1) from 0 to x, over x^a y^b: a series of positive terms, which grow for about
    (a+b) x - a terms and then fall."""
    term = total = 1 / mp.mpf(a)
    k = 0
    while term > total * TINY or (a + b + k) * x > a + 1 + k:
        term = term * (a + b + k) / (a + 1 + k) * x
        total += term
        k += 1
    return total


def log_e(count, n, p, q):
    a, b = count + mp.mpf(1) / 2, n - count + mp.mpf(1) / 2
    # The integral over t > p, over p^count q^(n-count).
    if p <= a / (a + b) and (p < 0.5 or n * q > 20_000):
        whole = mp.exp(mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(n + 1) - count * mp.log(p) - (n - count) * mp.log(q))
        beyond = whole - mp.sqrt(p * q) * lower_beta(p, q, a, b)
    else:
        beyond = mp.sqrt(p * q) * lower_beta(q, p, b, a)
    return mp.log(beyond / (2 * mp.asin(mp.sqrt(q))))


def bound(count, n, alpha):
    """The p at which the e-value falls to 1/alpha, by regula falsi in the log-odds."""
    p_of = lambda t: (1 / (1 + mp.exp(-t)), 1 / (1 + mp.exp(t)))
    f = lambda t: log_e(count, n, *p_of(t)) + mp.log(alpha)
    high = mp.log((count - mp.mpf(1) / 2) / (n - count + mp.mpf(1) / 2))
    low = high - 1
    while f(low) < 0:
        low -= 2
    return p_of(mp.findroot(f, (low, high), solver="anderson", tol=mp.mpf(10) ** -60, maxsteps=25, verify=False))


def text(x):
    return mp.nstr(x, 20, min_fixed=0, max_fixed=0)


def row(**cells):
    return "{" + ",".join(f'"{k}":{v if isinstance(v, str) else json.dumps(v)}' for k, v in cells.items()) + "}"


values = []
for n in (1, 2, 10, 100, 1000, 100_000, 10_000_000):
    for p in (0.5, 0.69, 0.8413, 0.977, 0.9987, 0.99999) if n < 1_000_000 else (0.5, 0.9987, 0.99999):
        mean, deviation = n * p, (n * p * (1 - p)) ** 0.5
        for count in sorted({0, n, n - 1, *(min(n, max(0, round(mean + z * deviation))) for z in (-5, -1, 0, 1, 4, 9))}):
            exact, rest = mp.mpf(p), 1 - mp.mpf(p)
            values.append(row(count=count, n=n, p=p, q=text(rest), log_e=text(log_e(count, n, exact, rest))))

bounds = []
for n in (1, 10, 100, 1000, 100_000, 10_000_000):
    for alpha in (0.05, 0.001, 1e-6) if n < 100_000 else (0.001,):
        for count in sorted({1, n // 2, n - n // 100 if n < 1_000_000 else n - 1000, n - 1, n} - {0}):
            p, q = bound(count, n, mp.mpf(alpha))
            bounds.append(row(count=count, n=n, alpha=alpha, p=text(p), q=text(q)))

head = f'"made_by":"scripts/golden/sequential.py","mpmath":"{mpmath.__version__}","digits":{mp.dps}'
join = ",\n".join
OUT.write_text(f'{{{head},\n"log_e_value":[\n{join(values)}\n],\n"anytime_lower_bound":[\n{join(bounds)}\n]}}\n')
print(len(values), "e-values,", len(bounds), "bounds")
