"""`kvserve eval`: what a policy costs in quality, measured through the serving engine."""
