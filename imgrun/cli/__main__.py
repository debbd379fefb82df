from imgrun.cli import main

main()
