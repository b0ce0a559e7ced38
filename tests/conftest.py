from hypothesis import settings

# Correctness is what the tests are about: a busy machine is no failure.
settings.register_profile("verl_sspo", deadline=None)
settings.load_profile("verl_sspo")
