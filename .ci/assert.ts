/**
 * Stands in for `@std/assert` where JSR is out of reach: the same names and types, over Node's assertions.
 *
 * @module
 */

import assertStrict from "node:assert/strict";

/** Asserts that the value is truthy. */
export function assert(actual: unknown, message?: string): asserts actual {
  assertStrict.ok(actual, message);
}

/** Asserts that both are deeply equal. */
export function assertEquals<T>(actual: T, expected: T, message?: string): void {
  assertStrict.deepEqual(actual, expected, message);
}

/** Asserts that the string matches. */
export function assertMatch(actual: string, expected: RegExp, message?: string): void {
  assertStrict.match(actual, expected, message);
}
