@python "%~dp0ds" %*
