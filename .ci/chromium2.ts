import "../main_test.ts?Chromium2";
