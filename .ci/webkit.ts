import "../main_test.ts?WebKit";
