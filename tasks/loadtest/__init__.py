"""The load test of a served model beside the baseline's server: requests, trials, and the figures from them."""
