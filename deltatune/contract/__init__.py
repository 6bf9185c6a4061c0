"""The contract suite: what every method must keep, checked on every kind of site that it names.

    from deltatune import contract
    print(contract.text(contract.run(MyMethod)))

One check is one function of `checks`, one kind of site one small model of `beds`. By default each check runs once, on a
kind and a dtype drawn by the seed; `full=True` runs the product.
"""

from .beds import BEDS as BEDS
from .checks import CHECKS as CHECKS
from .checks import Result as Result
from .checks import checks_of as checks_of
from .pair import PAIR as PAIR
from .run import beds_of as beds_of
from .run import run as run
from .run import run_check as run_check
from .table import table as table
from .table import text as text
