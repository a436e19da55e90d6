"""Rule following: a task on language whose true reward is a program that also says which tokens earned or broke it."""
