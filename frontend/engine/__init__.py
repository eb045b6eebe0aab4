"""One HTTP request on the engine: parameters, job, metrics, the link to the scheduler."""
