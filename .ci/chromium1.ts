import "../main_test.ts?Chromium1";
