import "../main_test.ts?room";
