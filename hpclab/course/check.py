"""Exercise checks: three answers, each naming a misconception and never the solution.

No check depends on absolute time. An answer that isn't there yet, or that breaks, gets a verdict and raises no error.
"""

import json
import os
from collections.abc import Callable

from hpclab.course import checks, logbook
from hpclab.course.verdicts import Decided, Result, answered
from hpclab.course.verdicts import inconclusive as inconclusive
from hpclab.language import translate as _


def check(exercise_id: str, answer: object) -> Result:
    """Check the answer to an exercise.

    Parameters
    ----------
    exercise_id : str
        For example "start.gang": the notebook's slug and the exercise's name.
    answer : object
        What the exercise asks for: a value or a function.

    Returns
    -------
    Result
        Shows itself in a notebook; true only if the answer passed.

    Raises
    ------
    ValueError
        If there is no such exercise.
    AssertionError
        Under nbgrader (it sets `NBGRADER_EXECUTION` when it grades or validates), for anything but a pass.
    """
    run = checks.find(exercise_id)
    try:
        result = run(answered(answer))
    except Decided as decided:
        result = decided.result
    if result:
        logbook.remember(exercise_id)
    if "NBGRADER_EXECUTION" in os.environ and not result:
        raise AssertionError(result.message)
    return result


def judged(nonce: str, exercise_id: str, seed: str, answer: Callable[[], object]) -> str:
    """For `hpclab grade`, in a student's kernel: the verdict on what `answer` returns, as JSON, with the nonce.

    While the check runs, the seed is set, and a failure doesn't raise as it would under nbgrader.
    """
    before = {name: os.environ.pop(name, None) for name in ("HPCLAB_SEED", "NBGRADER_EXECUTION")}
    os.environ["HPCLAB_SEED"] = seed
    try:
        result = check(exercise_id, answer())
        return json.dumps([nonce, result.status, result.message])
    except NameError as error:
        message = _("{name} isn't defined: the cell that makes it is missing, or raised an error.", name=error.name)
        return json.dumps([nonce, "fail", message])
    finally:
        del os.environ["HPCLAB_SEED"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
