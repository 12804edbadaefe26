@python "%~dp0dsr" %*
