"""One HTTP request on its way through the engine: parameters, job, the link to the scheduler."""
