"""The `mtjax` command: the only home of gin and flags."""

import time

STARTED = time.perf_counter()  # as near to the start of the process as Python code can say
