"""What `neox-jax VERB` does, a module for verbs that belong together; each loads what it needs when it is used."""
