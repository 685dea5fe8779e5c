"""One file per benchmark; being here is all the registration there is (see `pumice.evaluate.task`)."""
