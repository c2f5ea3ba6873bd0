"What the callbacks cost, beside what else there is: `python -m benchmarks --help`"
