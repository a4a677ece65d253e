"""The probe of the self-test and of `kvserve doctor`: a request whose answers are computed a second time."""
