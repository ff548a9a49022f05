"""NPT: a Llama whose attention modulates the weights of its MLPs."""
