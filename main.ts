/**
 * A chat room. People open the page, and everyone who has it open sees each message at once.
 *
 * A message goes one way: a socket receives it (`Room.receive`), `check` says whether it can be accepted, the
 * `Log` writes it down together with whatever else arrived meanwhile, and only then is it sent to every socket
 * in the `Set`. So nothing that anyone has seen can be lost, and everyone sees the same order.
 *
 * ```sh
 * deno task start
 * ```
 *
 * @module
 */

import page from "./index.html" with { type: "text" };

// ───────────────────────────────────────────── Settings and limits ─────────────────────────────────────────────

/** What {@linkcode startChat} can be told. Everything has a default. */
export interface ChatOptions {
  /** The TCP port; 0 takes a free one. Default: 8000. */
  port?: number;
  /** The address to listen on; `0.0.0.0` is every network that the machine is on. Default: `127.0.0.1`. */
  hostname?: string;
  /**
   * Where the room is kept: a path, `:memory:`, the URL of a remote database, or a database that is open already
   * (and stays open after the shutdown). Default: the storage that Deno itself has for this program.
   */
  db?: string | Deno.Kv;
  /** How many messages are kept; the oldest are deleted as new ones come. Default: 10000. */
  history?: number;
  /** Whether accepted messages are logged to the terminal. Default: true. */
  log?: boolean;
  /** What has to be known to join; the empty string lets everyone in. Default: everyone. */
  password?: string;
  /** Messages a second that a connection may send, five seconds' worth at once; 0 sets no limits. Default: 20. */
  rateLimit?: number;
  /** Connections at a time. Default: 10000. */
  maxClients?: number;
  /** Connections at a time from one address; 0 sets no limit. Default: 0. */
  maxClientsPerAddress?: number;
  /** Origins besides the server's own whose pages may connect, like `https://chat.example`. Default: none. */
  allowedOrigins?: string[];
  /** Whether the address of a client is the last in `X-Forwarded-For`: only behind a proxy. Default: false. */
  trustProxy?: boolean;
  /** Seconds after which a silent connection is closed, if it does not answer a ping either. Default: 30. */
  idleTimeout?: number;
  /** The path of a certificate, in PEM: with it, HTTPS and WSS are served. Default: HTTP and WS. */
  tlsCert?: string;
  /** The path of its key, in PEM. */
  tlsKey?: string;
}

/** A chat that runs. `await using` shuts it down at the end of the block. */
export interface Chat extends AsyncDisposable {
  /** Where it listens. */
  readonly addr: Deno.NetAddr;
  /** Writes what is pending, closes every socket with 1001, and ends, within 2 s: a database that hangs is not waited for. */
  shutdown(): Promise<void>;
}

/** How a setting is read from the environment. */
interface Setting<T> {
  /** The variable. */
  name: string;
  /** What it is without that. */
  preset: T;
  /** What its text means; undefined if that makes no sense. */
  read(text: string): T | undefined;
  /** What would make sense. */
  sense: string;
}

const anything = <T extends string | undefined>(name: string, preset: T): Setting<string | T> => (
  { name, preset, read: (text) => text, sense: "a text" }
);
const whole = (name: string, preset: number, least = 0, most = Number.MAX_SAFE_INTEGER): Setting<number> => ({
  name,
  preset,
  read: (text) => /^\d+$/.test(text) && Number(text) >= least && Number(text) <= most ? Number(text) : undefined,
  sense: `a whole number from ${least} to ${most}`,
});
const onOrOff = (name: string, preset: boolean): Setting<boolean> => (
  { name, preset, read: (text) => text === "on" || (text === "off" ? false : undefined), sense: "on or off" }
);
const origins = (name: string): Setting<string[]> => ({
  name,
  preset: [],
  read: (text) => text.split(",").every((origin) => URL.parse(origin)?.origin === origin) ? text.split(",") : undefined,
  sense: "origins with commas between them, like https://chat.example",
});

const SETTINGS = {
  port: whole("PORT", 8000, 0, 65_535),
  hostname: anything("HOST", "127.0.0.1"),
  db: anything("CHAT_DB", undefined),
  history: whole("CHAT_HISTORY", 10_000, 1),
  log: onOrOff("CHAT_LOG", true),
  password: anything("CHAT_PASSWORD", ""),
  rateLimit: whole("CHAT_RATE_LIMIT", 20),
  maxClients: whole("CHAT_MAX_CLIENTS", 10_000, 1),
  maxClientsPerAddress: whole("CHAT_MAX_CLIENTS_PER_ADDRESS", 0),
  allowedOrigins: origins("CHAT_ALLOWED_ORIGINS"),
  trustProxy: onOrOff("CHAT_TRUST_PROXY", false),
  idleTimeout: whole("CHAT_IDLE_TIMEOUT", 30, 1),
  tlsCert: anything("CHAT_TLS_CERT", undefined),
  tlsKey: anything("CHAT_TLS_KEY", undefined),
} satisfies { [Option in keyof ChatOptions]-?: Setting<ChatOptions[Option]> };

/** Every option, with a value where it has a default. */
type Settings = {
  [Option in keyof typeof SETTINGS]: Exclude<ChatOptions[Option], undefined> | typeof SETTINGS[Option]["preset"];
};

const DEFAULTS = Object.fromEntries(
  Object.entries(SETTINGS).map(([option, { preset }]) => [option, preset]),
) as Settings;

/** The options that the environment names. Throws a `RangeError` for one that makes no sense. */
function environment(): ChatOptions {
  const named = Object.entries(SETTINGS).flatMap(([option, { name, read, sense }]) => {
    const text = Deno.env.get(name);
    if (!text) return [];
    const value = read(text);
    if (value === undefined) throw new RangeError(`${name} must be ${sense}, not "${text}"`);
    return [[option, value]];
  });
  return Object.fromEntries(named);
}

const MAX_USERNAME = 40; // UTF-16 units, as maxlength counts
const MAX_MESSAGE = 2000; // UTF-16 units
const MAX_FRAME = 64 * 1024; // bytes of a frame from a client: far over every limit
const MAX_UNSENT = 1024 * 1024; // bytes that wait for one slow reader before it is cut off
const RATES = { join: 2, history: 5, typing: 2, ping: 2, error: 20, guess: 1 }; // a second, besides messages
const BURST = 5000; // ms whose worth of events may come at once
const WRONG = 1000; // ms until a wrong password is answered
const JOIN = 10_000; // ms in which a client must join a room that has a password
const MAX_QUEUE = 16 * 1024 * 1024; // UTF-16 units of messages that wait for the database
const MAX_VALUE = 64 * 1024; // bytes of one value in KV, and so of one entry in the log
const MAX_TURNS = 20; // turns of the event loop that arriving messages are waited for
const MAX_COPIES = 128 * 1024; // bytes that are given to sockets before these get time to send them
const MAX_DELETES = 500; // entries that one commit deletes: KV takes 1000 changes at most
const PAGE = 200; // messages that a join without `since`, or a request for history, is answered with
const MAX_BACKLOG = 192 * 1024; // UTF-16 units of older messages in one frame
const GATHER = 100; // ms in which presence and typing are gathered into one frame
const MAX_TYPING = 10; // names that are told to be typing at once
const POLL = 1000; // ms between looks at what other instances wrote
const MAX_ROSTER = 5000; // names in a roster: more might not fit into MAX_UNSENT
const ROSTER = 500; // names in one value in KV
const HEARTBEAT = 10_000; // ms after which an instance renews its roster
const PRESUMED_DEAD = 30_000; // ms after which a roster that was not renewed is out of date
const RETRY = { first: 25, most: 2000, silent: 3 }; // ms before a failed write is tried again; failures to report
const DRAIN = 20; // ms between looks whether a slow reader took what it was sent
const STALL = 30_000; // ms that a reader of its backlog may take nothing
const REPORT = 8; // messages of one batch that are logged with a line each
const SHUTDOWN = 600; // ms that the shutdown waits for the log, for presence and for the network: 2 s in all

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));
const wait = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

const report = (error: Error) => console.error(`The server made a mistake: ${error.message}`);

/** Waits for the promise, but no longer than `ms`. */
async function within(ms: number, promise: Promise<unknown> | undefined): Promise<void> {
  let timer;
  await Promise.race([promise, new Promise((resolve) => timer = setTimeout(resolve, ms))]);
  clearTimeout(timer);
}

// ─────────────────────────────────────────────── Events on the wire ───────────────────────────────────────────────

/** A message that can be accepted. */
interface Message {
  event: "send_message";
  username: string;
  message: string;
  id?: string;
  /** Its part of the line on the wire: the start comes when its place in the order is known. */
  body: string;
}

/** What a client may send, once {@linkcode check} has seen it. */
type Incoming =
  | Message
  | { event: "join"; username?: string; since?: number; password?: string }
  | { event: "history"; before: number }
  | { event: "typing" }
  | { event: "ping" }
  | Refusal;

/** What a client is told when something cannot be accepted. `retry_after` is in milliseconds. */
type Refusal = { event: "error"; error: string; id?: string; retry_after?: number };

/** A message as everyone receives it. */
const line = (seq: number, time: number, body: string) =>
  `{"event":"receive_message","seq":${seq},"time":${time},${body}`;

// ─────────────────────────────────────────── Checking what a client sends ───────────────────────────────────────────

const INVISIBLE = /[[\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]--[\t-\r]]/gv;
const ID = /^[\w-]{1,64}$/;

/**
 * A message of which nothing has to be changed, as programs write it that have nothing but ASCII to say: its line on
 * the wire is a part of it, and needs neither parsing nor serialising.
 */
const USUAL =
  /^\{"event":"send_message",("username":"(?=[^"]{1,40}")([!#-[\]-~]+(?: [!#-[\]-~]+)*)","message":"([!#-[\]-~](?:[ !#-[\]-~]{0,1998}[!#-[\]-~])?)"(?:,"id":"([\w-]{1,64})")?\})$/;

/** A name as it is shown: nothing in it can hide, reorder a line, or start another one. */
const cleanName = (name: string) => name.toWellFormed().normalize().replace(INVISIBLE, "").replace(/\s+/g, " ").trim();

/** Everything that a client may send is checked here. */
function check(frame: unknown): Incoming {
  if (typeof frame !== "string") return refusal("a frame must be text, not binary");
  const usual = USUAL.exec(frame);
  if (usual) {
    const [, body, username, message, id] = usual;
    return { event: "send_message", username, message, id, body };
  }
  let data: Record<string, unknown>;
  try {
    data = JSON.parse(frame);
  } catch {
    return refusal('a frame must be JSON, like {"event":"send_message","username":"Ada","message":"Hi"}');
  }
  if (typeof data !== "object" || data === null || Array.isArray(data)) {
    return refusal("a frame must be a JSON object");
  }
  const { event = "message" in data ? "send_message" : undefined } = data;
  switch (event) {
    case "send_message": {
      const { username, message, id } = data;
      if (id !== undefined && !(typeof id === "string" && ID.test(id))) {
        return refusal("id must be 1 to 64 of A-Z a-z 0-9 _ -");
      }
      const name = typeof username === "string" ? cleanName(username) : "";
      if (!name || name.length > MAX_USERNAME) {
        return refusal(`username must be 1 to ${MAX_USERNAME} characters`, id);
      }
      const text = typeof message === "string" ? message.trim() : "";
      if (!text || text.length > MAX_MESSAGE) {
        return refusal(`message must be 1 to ${MAX_MESSAGE} characters`, id);
      }
      const kept = text.toWellFormed().replaceAll("\0", "\ufffd");
      const body = JSON.stringify({ username: name, message: kept, id }).slice(1);
      return { event, username: name, message: kept, id, body };
    }
    case "join": {
      const { username, since, password } = data;
      const name = typeof username === "string" ? cleanName(username) : undefined;
      if (username !== undefined && (!name || name.length > MAX_USERNAME)) {
        return refusal(`username must be 1 to ${MAX_USERNAME} characters`);
      }
      if (since !== undefined && !isWhole(since)) {
        return refusal("since must be a whole number, the last seq seen");
      }
      if (password !== undefined && typeof password !== "string") return refusal("password must be a string");
      return { event, username: name, since, password };
    }
    case "history":
      return isWhole(data.before)
        ? { event, before: data.before }
        : refusal("before must be a whole number, the oldest seq seen");
    case "typing":
    case "ping":
      return { event };
    default:
      return refusal("event must be send_message, join, history, typing or ping");
  }
}

/** Whether a frame is over {@linkcode MAX_FRAME}. */
function isLarge(frame: unknown): boolean {
  if (typeof frame !== "string") return (frame as ArrayBuffer).byteLength > MAX_FRAME;
  return frame.length > MAX_FRAME / 3 && size(frame) > MAX_FRAME;
}

/** The size of a text in UTF-8. */
const size = (text: string) => new Blob([text]).size;

/** Whether the guess is the secret. How long that takes says nothing of the secret. */
function isSecret(guess: string, secret: string): boolean {
  const encoder = new TextEncoder(), a = encoder.encode(guess), b = encoder.encode(secret);
  let different = a.length ^ b.length;
  for (const [i, byte] of a.entries()) different |= byte ^ b[i % b.length];
  return different === 0;
}

const isWhole = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

const refusal = (error: string, id?: string, retry_after?: number): Refusal => ({
  event: "error",
  error,
  id,
  retry_after,
});

// ──────────────────────────────────────────────────── The log ────────────────────────────────────────────────────

/** Messages that were written together. */
interface Entry {
  /** The numbers of its first and its last message. */
  first: number;
  last: number;
  /** Their lines as they go on the wire, joined by newlines. */
  text: string;
  /** The size of the text in UTF-8. */
  bytes: number;
}

/** What the log tells the room. It waits for the answer before it writes more. */
interface LogEvents {
  /** This is written. `accepted` is what it was made of, if that was done here. */
  written(entry: Entry, accepted?: Message[]): Promise<void>;
  /** What was shown does not go on: the log was replaced, or much was written meanwhile. Everyone has to join again. */
  replaced(): void;
}

/**
 * The room's messages, in one order, in Deno KV and in memory.
 *
 * `["head"]` holds the number of the newest message; `["log", n]` holds the lines of an entry that begins with
 * message n. A commit checks that the head is still the one known here, so it succeeds only on top of everything
 * that was written before it, by whichever instance. That makes looking for an id in what is known here exact.
 *
 * Everything that changes the log passes through one loop, {@linkcode Log.#loop}: there is nothing to lock.
 */
class Log {
  static readonly #HEAD = ["head"];
  static readonly #encoder = new TextEncoder();
  static readonly #decoder = new TextDecoder();

  /** The newest message that is written. */
  head = 0;
  #version: string | null = null; // of the head key
  #entries: Entry[] = []; // what is kept, oldest first
  #ids = new Map<string, number>(); // the message that an id names, Infinity while it is not written
  #queue: Message[] = [];
  #queued = 0; // UTF-16 units in the queue
  #attempt = ""; // the text that a commit tried to write, while it is not known whether it did
  #behind = true; // another instance has written, or may have
  #working?: Promise<void>;
  #failures = 0; // in a row
  #ended = false;
  readonly #kv: Deno.Kv;
  readonly #history: number;
  readonly #events: LogEvents;

  constructor(kv: Deno.Kv, history: number, events: LogEvents) {
    this.#kv = kv;
    this.#history = history;
    this.#events = events;
  }

  /** The oldest message that is still kept. */
  get oldest(): number {
    return Math.max(this.#entries[0]?.first ?? 1, this.head - this.#history + 1);
  }

  /** The lines from message `seq` on, up to {@linkcode MAX_BACKLOG}, and the number of the last of them. */
  from(seq: number): { text: string; last: number } {
    let at = this.#at(seq), last = this.#entries[at].last;
    let text = this.#entries[at].text.split("\n").slice(seq - 1 - last).join("\n");
    while (++at < this.#entries.length && text.length + this.#entries[at].text.length < MAX_BACKLOG) {
      text += `\n${this.#entries[at].text}`;
      last = this.#entries[at].last;
    }
    return { text, last };
  }

  /** The line of message `seq`. */
  line(seq: number): string {
    const { first, text } = this.#entries[this.#at(seq)];
    return text.split("\n")[seq - first];
  }

  /** The lines before message `seq`, as many as make a {@linkcode PAGE}. */
  before(seq: number): string[] {
    const end = Math.min(seq - 1, this.head), start = Math.max(end - PAGE + 1, this.oldest);
    if (end < start) return [];
    const entries = this.#entries.slice(this.#at(start), this.#at(end) + 1);
    const lines = entries.flatMap(({ text }) => text.split("\n")).slice(start - entries[0].first);
    lines.length = end - start + 1;
    let units = 0;
    return lines.slice(lines.findLastIndex((line) => (units += line.length) > MAX_BACKLOG) + 1);
  }

  /** The message that has this id: its number, or `Infinity` while it is being written. */
  find(id: string): number | undefined {
    const seq = this.#ids.get(id);
    return seq !== undefined && seq >= this.oldest ? seq : undefined;
  }

  /** Takes a message to be written; false if too much is waiting. */
  append(message: Message): boolean {
    if (this.#queued + message.body.length > MAX_QUEUE) return false;
    this.#queue.push(message);
    this.#queued += message.body.length;
    if (message.id) this.#ids.set(message.id, Infinity);
    this.#work();
    return true;
  }

  /** Resolves when what other instances had written is known here too. Throws what the database throws. */
  async look(): Promise<void> {
    const { versionstamp } = await this.#kv.get(Log.#HEAD);
    if (versionstamp === this.#version) return;
    this.#behind = true;
    await this.#work();
  }

  /** Writes what is waiting, as far as the database lets it within {@linkcode SHUTDOWN}. */
  async close(): Promise<void> {
    await within(SHUTDOWN, this.#working);
    this.#ended = true;
  }

  #work(): Promise<void> {
    return this.#working ??= this.#loop().finally(() => this.#working = undefined);
  }

  /** Reads what others wrote, writes what is waiting: as long as there is any of it. */
  async #loop(): Promise<void> {
    while (!this.#ended && (this.#behind || this.#queue.length > 0)) {
      try {
        await (this.#behind ? this.#pull() : this.#commit());
        if (this.#failures >= RETRY.silent) console.error("The database works again");
        this.#failures = 0;
      } catch (error) {
        if (this.#ended) return;
        // Nothing is dropped: it stays in the queue, and its senders get no confirmation until it is written.
        this.#behind = true; // what failed may have been written all the same
        if (++this.#failures === RETRY.silent) {
          console.error(`The database fails: ${(error as Error).message}`);
        }
        await wait(Math.min(RETRY.first * 2 ** this.#failures, RETRY.most));
      }
    }
  }

  /** Writes what is waiting, as one entry in one commit. */
  async #commit(): Promise<void> {
    await this.#gather();
    const first = this.head + 1, time = Date.now();
    const lines: string[] = [];
    for (
      let units = 0;
      lines.length < this.#queue.length && units < MAX_VALUE;
      units += lines.at(-1)!.length + 1
    ) {
      lines.push(line(first + lines.length, time, this.#queue[lines.length].body));
    }
    let text = lines.join("\n"), value = Log.#encoder.encode(text);
    while (value.length > MAX_VALUE) {
      lines.length >>= 1;
      text = lines.join("\n");
      value = Log.#encoder.encode(text);
    }
    const last = this.head + lines.length;
    const expired = this.#expired(last);
    const commit = this.#kv.atomic().check({ key: Log.#HEAD, versionstamp: this.#version });
    commit.set(Log.#HEAD, last).set(["log", first], value);
    for (const entry of expired) commit.delete(["log", entry.first]);
    this.#attempt = text;
    const result = await commit.commit();
    this.#attempt = "";
    if (!result.ok) {
      this.#behind = true;
      return;
    }
    this.#version = result.versionstamp;
    this.#entries.splice(0, expired.length);
    const accepted = this.#take(lines.length);
    await this.#add({ first, last, text, bytes: value.length }, accepted, accepted);
  }

  /** Reads what others wrote, and drops from the queue what they hold of it. */
  async #pull(): Promise<void> {
    const { value, versionstamp } = await this.#kv.get<number>(Log.#HEAD);
    const head = value ?? 0;
    if (head < this.head) this.#forget();
    const news = this.#kv.list<Uint8Array>({ start: ["log", this.head + 1], end: ["log", head + 1] });
    for await (const { key, value } of head > this.head ? news : []) {
      const first = key[1] as number, text = Log.#decoder.decode(value), lines = text.split("\n");
      if (first > this.head + 1) this.#forget(first - 1);
      if (text === this.#attempt) this.#take(lines.length);
      this.#attempt = "";
      const entry = { first, last: first + lines.length - 1, text, bytes: value.length };
      await this.#add(entry, lines.map((line) => JSON.parse(line)));
    }
    this.#attempt = "";
    for (let expired = this.#expired(this.head); expired.length > 0; expired = this.#expired(this.head)) {
      const deletion = this.#kv.atomic();
      for (const { first } of expired) deletion.delete(["log", first]);
      await deletion.commit();
      this.#entries.splice(0, expired.length);
    }
    this.#version = versionstamp;
    this.#behind = false;
    const queue = this.#take(this.#queue.length);
    for (const message of queue) {
      if (!message.id || this.#ids.get(message.id) === Infinity) this.append(message);
    }
  }

  /** Lets what is arriving arrive, so that it is written together: it ends when a turn brings nothing more. */
  async #gather(): Promise<void> {
    for (let turns = 0, before = -1; turns < MAX_TURNS && this.#queue.length > before; turns++) {
      before = this.#queue.length;
      await turn();
    }
  }

  /** Takes the oldest `count` messages out of the queue. */
  #take(count: number): Message[] {
    const taken = this.#queue.splice(0, count);
    for (const { body } of taken) this.#queued -= body.length;
    return taken;
  }

  /** Makes an entry that is written known, here and to the room. */
  async #add(entry: Entry, messages: { id?: string }[], accepted?: Message[]): Promise<void> {
    let seq = entry.first;
    for (const { id } of messages) {
      if (id) {
        this.#ids.delete(id); // so that the map stays in order
        this.#ids.set(id, seq);
      }
      seq++;
    }
    this.head = entry.last;
    this.#entries.push(entry);
    for (const [id, seq] of this.#ids) {
      if (seq >= this.oldest) break;
      this.#ids.delete(id);
    }
    await this.#events.written(entry, accepted);
  }

  /** Starts over at `head`: the database holds another log than the one that is known here, or a gap. */
  #forget(head = 0): void {
    this.#events.replaced();
    this.head = head;
    this.#entries = [];
    for (const [id, seq] of this.#ids) if (seq !== Infinity) this.#ids.delete(id);
  }

  /** The entries of which nothing is kept any more once `head` is the newest message. */
  #expired(head: number): Entry[] {
    const kept = this.#entries.findIndex(({ last }) => last > head - this.#history);
    return this.#entries.slice(0, Math.min(kept < 0 ? this.#entries.length : kept, MAX_DELETES));
  }

  /** Where the entry that holds message `seq` is. */
  #at(seq: number): number {
    return this.#entries.findLastIndex(({ first }) => first <= seq);
  }
}

// ─────────────────────────────────────────────────── Presence ───────────────────────────────────────────────────

/** Some of the people on one instance, as the others read it. */
interface Roster {
  online: number;
  users: string[];
  /** When it is out of date, in milliseconds since 1970: an instance that lives renews it before. */
  until: number;
}

/** Who is here: on this instance, and on the others, as they write it to `["here", instance, n]`. */
class Presence {
  static readonly #HERE = ["here"];
  readonly #id = crypto.randomUUID();
  readonly #kv: Deno.Kv;
  #online = 0; // connections that joined, on this instance
  #users = new Map<string, number>(); // how many of them each name has
  #others: Roster[] = [];
  #told = { online: 0, users: new Set<string>() }; // what the room was told last
  #dirty = false; // what the other instances read of this one is not true any more
  #published = 0; // when they were last written to
  #chunks = 0; // how many values that took

  constructor(kv: Deno.Kv) {
    this.#kv = kv;
  }

  /** A connection joined, or left if `by` is -1. */
  count(username: string | undefined, by: 1 | -1): void {
    this.#online += by;
    this.#dirty = true;
    if (username === undefined) return;
    const connections = (this.#users.get(username) ?? 0) + by;
    if (connections > 0) this.#users.set(username, connections);
    else this.#users.delete(username);
  }

  /** Everyone, as last told; of a very large room not every name. */
  roster(): string {
    return JSON.stringify({
      event: "presence",
      online: this.#told.online,
      users: [...this.#told.users].slice(0, MAX_ROSTER),
    });
  }

  /** What changed since the room was last told; undefined if nothing did. */
  changes(): string | undefined {
    const users = new Set(this.#users.keys());
    let online = this.#online;
    for (const other of this.#others) {
      online += other.online;
      for (const name of other.users) users.add(name);
    }
    const joined = [...users.difference(this.#told.users)], left = [...this.#told.users.difference(users)];
    if (joined.length === 0 && left.length === 0 && online === this.#told.online) return undefined;
    this.#told = { online, users };
    return JSON.stringify({ event: "presence", online, joined, left });
  }

  /** Reads who is on the other instances, and lets them read who is on this one. Throws what the database throws. */
  async exchange(): Promise<void> {
    const others: Roster[] = [];
    for await (const { key, value } of this.#kv.list<Roster>({ prefix: Presence.#HERE })) {
      if (key[1] !== this.#id && value.until > Date.now()) others.push(value);
    }
    this.#others = others;

    const now = Date.now();
    const isSaid = this.#online === 0 && this.#chunks === 0 || now - this.#published < HEARTBEAT;
    if (isSaid && !this.#dirty) return;
    this.#dirty = false;
    this.#published = 0; // so that it is tried again if it fails
    const online = this.#online, names = [...this.#users.keys()], until = now + PRESUMED_DEAD;
    const chunks = online && Math.max(1, Math.ceil(names.length / ROSTER));
    for (let i = 0; i < Math.max(chunks, this.#chunks); i++) {
      const key = [...Presence.#HERE, this.#id, i];
      const users = names.slice(i * ROSTER, (i + 1) * ROSTER);
      if (i < chunks) {
        await this.#kv.set(key, { online: i ? 0 : online, users, until }, { expireIn: PRESUMED_DEAD });
      } else await this.#kv.delete(key);
    }
    this.#chunks = chunks;
    this.#published = now;
  }
}

// ─────────────────────────────────────────────────── The room ───────────────────────────────────────────────────

/** A socket with what the room knows of it. */
type Client = WebSocket & {
  /** Whether it joined: then a frame to it may hold several events, one a line. */
  joined: boolean;
  /** The name it joined with. */
  username?: string;
  /** The newest message it was sent. */
  seen: number;
  /** How often it joined: a newer join ends the catching up of an older one. */
  joins: number;
  /** At most how many bytes wait to be sent to it. */
  unsent: number;
  /** Where it comes from. */
  address: string;
  /** Whether it may see the room and talk: it knew the password, or there is none. */
  admitted: boolean;
  /** When it is closed for that. */
  timer?: ReturnType<typeof setTimeout>;
} & Limited;

/** Someone whose events are limited. */
interface Limited {
  /** For each kind of event a token bucket: all there is to know of one is when it will be full again. */
  full: Partial<Record<Limit, number>>;
}

type Limit = Incoming["event"] | "guess";

/** Everyone who is connected, and what they are sent. */
class Room {
  readonly #sockets = new Set<Client>();
  readonly #log: Log;
  readonly #presence: Presence;
  readonly #options: Settings;
  readonly #rates: Record<Limit, number>; // a second; 0 is no limit
  readonly #newcomers = new Set<Client>(); // joined since the room was last told who is here
  readonly #typing = new Set<string>(); // names that typed since then
  #connections = 0; // those, too, that were closed and do not answer
  readonly #addresses = new Map<string, number>(); // how many of them each address has
  readonly #guessers = new Map<string, Limited>(); // addresses that gave a wrong password
  #telling?: ReturnType<typeof setTimeout>; // the timer of the next news
  #looking?: Promise<void>; // the last look at other instances
  #timer?: ReturnType<typeof setTimeout>; // of the next
  #closed = false;

  constructor(kv: Deno.Kv, options: Settings) {
    this.#options = options;
    const { rateLimit, history } = options;
    const limits = rateLimit > 0 ? RATES : { join: 0, history: 0, typing: 0, ping: 0, error: 0, guess: RATES.guess };
    this.#rates = { ...limits, send_message: rateLimit };
    this.#log = new Log(kv, history, {
      written: (entry, accepted) => this.#broadcast(entry, accepted),
      replaced: () => this.#sockets.forEach((client) => this.#close(client, 1013, "the room was replaced")),
    });
    this.#presence = new Presence(kv);
  }

  /** Resolves when the log is read. Throws what the database throws. */
  async open(): Promise<void> {
    await this.#log.look();
    this.#looking = this.#look();
  }

  /** Whether there is no place for one more connection from this address. */
  isFull(address: string): boolean {
    const { maxClients, maxClientsPerAddress } = this.#options;
    return this.#connections >= maxClients ||
      maxClientsPerAddress > 0 && (this.#addresses.get(address) ?? 0) >= maxClientsPerAddress;
  }

  /** Takes a socket in: once it is open it gets every message, unless there is a password. */
  add(socket: WebSocket, address: string): void {
    const admitted = this.#options.password === "";
    const client: Client = Object.assign(socket, {
      joined: false,
      seen: -1,
      joins: 0,
      unsent: 0,
      address,
      admitted,
      full: {},
    });
    client.onopen = () => {
      const isFull = this.isFull(address); // others may have come since the handshake
      this.#connections++;
      this.#addresses.set(address, (this.#addresses.get(address) ?? 0) + 1);
      if (this.#closed) return client.close(1001, "the server is going away");
      if (isFull) return client.close(1013, "the room is full");
      if (admitted) client.seen = this.#log.head;
      else client.timer = setTimeout(() => this.#close(client, 1008, "no password in time"), JOIN);
      this.#sockets.add(client);
    };
    client.onclose = () => {
      this.#leave(client);
      this.#connections--;
      const others = this.#addresses.get(address)! - 1;
      if (others > 0) this.#addresses.set(address, others);
      else this.#addresses.delete(address);
    };
    const failed = (error: Error) => {
      report(error);
      this.#close(client, 1011, "the server made a mistake");
    };
    client.onmessage = ({ data }) => {
      try {
        this.#receive(client, data)?.catch(failed);
      } catch (error) {
        failed(error as Error);
      }
    };
  }

  /** Writes what is pending and closes every socket with 1001. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#log.close();
    for (const client of this.#sockets) this.#close(client, 1001, "the server is going away");
    clearTimeout(this.#telling);
    clearTimeout(this.#timer);
    const leaving = async () => {
      await this.#looking;
      await this.#presence.exchange();
    };
    await within(SHUTDOWN, leaving().catch(() => {})); // else it is presumed dead, later
  }

  /** Closes a connection. It has left at once: one that does not read would not let itself be closed. */
  #close(client: Client, code: number, reason: string): void {
    client.close(code, reason);
    this.#leave(client);
  }

  #leave(client: Client): void {
    clearTimeout(client.timer);
    if (!this.#sockets.delete(client) || !client.joined) return;
    this.#newcomers.delete(client);
    this.#presence.count(client.username, -1);
    this.#news();
  }

  /** Does what a frame asks for. */
  #receive(client: Client, frame: unknown): Promise<void> | void {
    if (this.#closed || !this.#sockets.has(client)) return; // unconfirmed: it is sent again, to whoever comes next
    if (isLarge(frame)) return this.#close(client, 1009, `a frame may have ${MAX_FRAME} bytes`);
    const incoming = check(frame);
    if (incoming.event === "error") return this.#refuse(client, incoming);
    const { event } = incoming, id = event === "send_message" ? incoming.id : undefined;
    const wait = this.#spend(client, event);
    if (wait > 0) {
      const error = `too many of ${event}: try again in ${Math.ceil(wait / 100) / 10} s`;
      return this.#refuse(client, refusal(error, id, wait));
    }
    if (!client.admitted && event !== "join") {
      return this.#refuse(client, refusal("join with the password first", id));
    }
    switch (event) {
      case "send_message":
        return this.#accept(client, incoming);
      case "join":
        return this.#join(client, incoming);
      case "history":
        if (!client.joined) return this.#refuse(client, refusal("join before asking for history"));
        return this.#send(
          client,
          `{"event":"history","before":${incoming.before},"messages":[${this.#log.before(incoming.before)}]}`,
        );
      case "typing":
        if (client.username === undefined) {
          return this.#refuse(client, refusal("join with a username before typing"));
        }
        this.#typing.add(client.username);
        return this.#news();
      case "ping":
        return this.#send(client, '{"event":"pong"}');
    }
  }

  /** Takes a token from the bucket for this kind of event: 0, or the milliseconds until there is one. */
  #spend({ full }: Limited, limit: Limit): number {
    if (this.#rates[limit] === 0) return 0;
    const now = performance.now();
    const after = Math.max(full[limit] ?? 0, now) + 1000 / this.#rates[limit];
    if (after > now + BURST) return Math.ceil(after - now - BURST);
    full[limit] = after;
    return 0;
  }

  /** Says what is wrong, unless the client does not care: then it is closed. */
  #refuse(client: Client, refusal: Refusal): void {
    if (this.#spend(client, "error") > 0) return this.#close(client, 1013, "too many errors");
    this.#send(client, JSON.stringify(refusal));
  }

  #accept(client: Client, message: Message): void {
    const { id } = message, known = id && this.#log.find(id);
    if (known) {
      // What is being written, or is still to come in its backlog, comes back by itself.
      if (known <= client.seen) this.#send(client, this.#log.line(known));
      return;
    }
    if (this.#log.append(message)) return;
    this.#refuse(client, refusal("the room is not able to keep more just now: try again in 1 s", id, 1000));
  }

  /** Lets a client in that knows the password; another is closed, and its address may not guess on at will. */
  #admit(client: Client, password: string): void {
    const guesser = this.#guessers.get(client.address);
    const tired = guesser !== undefined &&
      guesser.full.guess! > performance.now() + BURST - 1000 / RATES.guess;
    client.admitted = !tired && isSecret(password, this.#options.password);
    clearTimeout(client.timer);
    if (client.admitted) return;
    if (!tired) {
      const one = guesser ?? { full: {} };
      this.#spend(one, "guess");
      this.#guessers.set(client.address, one);
    }
    this.#sockets.delete(client); // so that nothing more is taken from it
    const [code, reason] = tired ? [1013, "too many wrong passwords, try again later"] : [1008, "wrong password"];
    client.timer = setTimeout(() => client.close(code, reason), WRONG);
  }

  async #join(client: Client, { username, since, password = "" }: Incoming & { event: "join" }): Promise<void> {
    if (!client.admitted) this.#admit(client, password);
    if (!client.admitted) return;
    if (since !== undefined && since > this.#log.head) {
      await within(POLL, this.#log.look().catch(() => {})); // it may have seen more on another instance
      if (!this.#sockets.has(client)) return;
    }
    const { head, oldest } = this.#log;
    if (since !== undefined && since > head) {
      return this.#refuse(client, refusal(`since is beyond the newest message, which is ${head}`));
    }
    if (client.joined) this.#presence.count(client.username, -1);
    this.#presence.count(username, 1);
    client.joined = true;
    client.username = username;
    client.joins++;
    client.seen = Math.max(since ?? head - PAGE, oldest - 1);
    this.#newcomers.add(client);
    this.#news();
    this.#send(client, JSON.stringify({ event: "joined", seq: head, oldest }));
    return this.#catchUp(client);
  }

  /** Sends what the client missed, no faster than it reads; once it has seen the newest, it gets what comes. */
  async #catchUp(client: Client): Promise<void> {
    const { joins } = client;
    let patience = performance.now() + STALL;
    while (client.seen < this.#log.head) {
      if (client.bufferedAmount > MAX_BACKLOG) {
        if (performance.now() > patience) return this.#close(client, 1013, "too slow");
        await wait(DRAIN);
        if (client.joins !== joins || client.readyState !== WebSocket.OPEN) return;
        continue;
      }
      if (client.seen < this.#log.oldest - 1) {
        return this.#close(client, 1013, "too slow: what comes next is deleted");
      }
      const { text, last } = this.#log.from(client.seen + 1);
      this.#send(client, text);
      client.seen = last;
      patience = performance.now() + STALL;
    }
  }

  /**
   * Sends what was written to everyone who has seen all that is before it: to those who joined in one frame, to
   * the others in a frame a message. Sockets are served some at a time: so the copies that are made for them
   * stay in the processor's cache, and nothing else waits long.
   */
  async #broadcast({ first, last, text, bytes }: Entry, accepted?: Message[]): Promise<void> {
    if (accepted && this.#options.log) this.#report(first, accepted);
    let unsent = 0, lines: string[] | undefined;
    for (const client of this.#sockets) {
      if (client.seen !== first - 1) continue;
      client.seen = last;
      if (client.joined) this.#send(client, text, bytes);
      else for (const line of lines ??= text.split("\n")) this.#send(client, line);
      if ((unsent += bytes) < MAX_COPIES) continue;
      await turn();
      unsent = 0;
    }
  }

  #report(first: number, accepted: Message[]): void {
    if (accepted.length > REPORT) {
      return console.log(`Message received: ${accepted.length} at once, from ${first} on`);
    }
    for (const [i, { username, message }] of accepted.entries()) {
      console.log(
        `Message received: ${first + i} from ${JSON.stringify(username)}, ${message.length} characters`,
      );
    }
  }

  /** Sends a frame, or cuts the client off if too much is waiting for it. A character has at most 3 bytes. */
  #send(client: Client, frame: string, bytes = 3 * frame.length): void {
    client.unsent += bytes;
    if (client.unsent > MAX_UNSENT) { // looked at no more often than that: it costs
      client.unsent = client.bufferedAmount + bytes;
      if (client.unsent > MAX_UNSENT) return this.#close(client, 1013, "too slow");
    }
    client.send(frame);
  }

  /** Tells everyone who joined, soon, who came, left and is typing: a rush of them is a few frames. */
  #news(): void {
    this.#telling ??= setTimeout(() => this.#tell().catch(report), GATHER);
  }

  async #tell(): Promise<void> {
    const changes = this.#presence.changes();
    const newcomers = new Set(this.#newcomers), typing = [...this.#typing].slice(0, MAX_TYPING);
    this.#newcomers.clear();
    this.#typing.clear();
    const frame = (first?: string, self?: string) => {
      const others = typing.filter((name) => name !== self);
      const lines = others.map((username) => JSON.stringify({ event: "typing", username }));
      const text = (first ? [first, ...lines] : lines).join("\n");
      return { first, text, bytes: size(text) };
    };
    const forMost = frame(changes), forNew = frame(newcomers.size > 0 ? this.#presence.roster() : undefined);
    let unsent = 0, turns = 0;
    for (const client of this.#sockets) {
      if (!client.joined || this.#newcomers.has(client)) continue;
      const { first, text, bytes } = newcomers.has(client) ? forNew : forMost;
      const own = typing.includes(client.username!) ? frame(first, client.username).text : text;
      if (!own) continue;
      this.#send(client, own, bytes);
      if ((unsent += bytes) < MAX_COPIES) continue;
      await turn();
      unsent = 0;
      turns++;
    }
    this.#telling = undefined;
    if (turns > 0) this.#news(); // of what happened meanwhile
  }

  /** Sees what other instances did, and lets them see this one, every {@linkcode POLL}. */
  async #look(): Promise<void> {
    for (const [address, { full }] of this.#guessers) {
      if (full.guess! < performance.now()) this.#guessers.delete(address);
    }
    try {
      await within(POLL, this.#log.look());
      await this.#presence.exchange();
      this.#news();
    } catch {
      // The database fails. The log says so when there is something to write; the next look comes anyway.
    }
    if (!this.#closed) this.#timer = setTimeout(() => this.#looking = this.#look(), POLL);
  }
}

// ───────────────────────────────────────────────────── HTTP ─────────────────────────────────────────────────────

/**
 * Makes what answers with the page: compressed, once for everyone, where the browser takes that. Its policy is that it
 * may run its own script and style, talk to its own server, and nothing else.
 */
async function pageServer(): Promise<(request: Request) => Response> {
  const hash = async (tag: string) => {
    const text = page.match(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`))?.[1] ?? "";
    const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
    return `'sha256-${new Uint8Array(digest).toBase64()}'`;
  };
  const policy = [
    "default-src 'none'",
    `script-src ${await hash("script")}`,
    `style-src ${await hash("style")}`,
    "img-src data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
  ];
  const headers = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-cache",
    "content-security-policy": policy.join("; "),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
    "x-content-type-options": "nosniff",
  };
  const gzip = await new Response(new Blob([page]).stream().pipeThrough(new CompressionStream("gzip"))).bytes();
  return (request) =>
    /\bgzip\b/.test(request.headers.get("accept-encoding") ?? "")
      ? new Response(gzip, { headers: { ...headers, "content-encoding": "gzip" } })
      : new Response(page, { headers });
}

const text = (status: number, body: string, headers?: HeadersInit) => new Response(`${body}\n`, { status, headers });

/** Whether the page that sends a handshake may: it is the server's own or an allowed one, or it is no page. */
function isAllowed({ headers, url }: Request, allowedOrigins: string[]): boolean {
  const origin = headers.get("origin");
  return origin === null || allowedOrigins.includes(origin) || URL.parse(origin)?.host === new URL(url).host;
}

/** Answers a handshake with a socket for the room, or with why there is none. */
function upgrade(
  request: Request,
  room: Room,
  address: string,
  options: Settings,
): Response {
  if (!isAllowed(request, options.allowedOrigins)) return text(403, "This page may not connect");
  if (room.isFull(address)) return text(503, "The room is full", { "retry-after": "30" });
  try {
    const { socket, response } = Deno.upgradeWebSocket(request, options);
    room.add(socket, address);
    return response;
  } catch {
    return text(400, "This is not a WebSocket handshake");
  }
}

/** Answers any other request: with the page, or with what is wrong. */
function respond(request: Request, servePage: (request: Request) => Response): Response {
  const { pathname } = new URL(request.url);
  if (pathname !== "/" && pathname !== "/healthz") return text(404, "Not found");
  if (request.method !== "GET" && request.method !== "HEAD") {
    return text(405, "Method not allowed", { allow: "GET, HEAD" });
  }
  return pathname === "/" ? servePage(request) : text(200, "ok");
}

// ───────────────────────────────────────────────────── Start ─────────────────────────────────────────────────────

/**
 * Starts a chat server. It serves the page at `/` and upgrades WebSockets on any path.
 *
 * Throws `Deno.errors.AddrInUse` if the port is taken, what `Deno.openKv` throws, and what reading the certificate throws.
 *
 * ```ts
 * import { startChat } from "./main.ts";
 *
 * await using chat = await startChat({ port: 0, db: ":memory:" });
 * console.log(chat.addr.port);
 * ```
 */
export async function startChat(options: ChatOptions = {}): Promise<Chat> {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const settings: Settings = { ...DEFAULTS, ...Object.fromEntries(given) };
  const { port, hostname, db, tlsCert, tlsKey, trustProxy } = settings;
  const [cert, key] = await Promise.all([tlsCert, tlsKey].map((path) => path && Deno.readTextFile(path)));
  // The database opens while the page is served already; sockets wait for it.
  const opening = (async () => {
    const kv = typeof db === "object" ? db : await Deno.openKv(db);
    const room = new Room(kv, settings);
    await room.open();
    return { kv, room };
  })();
  const pages = pageServer();
  const handler = async (request: Request, { remoteAddr }: Deno.ServeHandlerInfo<Deno.NetAddr>) => {
    if (!URL.canParse(request.url)) return text(400, "Bad request");
    if (request.headers.get("upgrade")?.toLowerCase() !== "websocket") return respond(request, await pages);
    const forwarded = trustProxy && request.headers.get("x-forwarded-for")?.split(",").at(-1)?.trim();
    return upgrade(request, (await opening).room, forwarded || remoteAddr.hostname, settings);
  };
  let server: Deno.HttpServer<Deno.NetAddr> | undefined;
  let ending: Promise<void> | undefined;
  const shutdown = () =>
    ending ??= (async () => {
      const { kv, room } = await opening;
      await room.close();
      if (server) await within(SHUTDOWN, server.shutdown());
      if (kv !== db) kv.close();
    })();
  try {
    server = Deno.serve({ port, hostname, cert, key, onListen() {} }, handler);
    await opening;
  } catch (error) {
    await shutdown().catch(() => server?.shutdown()); // there may be no room to shut down
    throw error;
  }
  return { addr: server.addr, shutdown, [Symbol.asyncDispose]: shutdown };
}

/** Where the page can be opened: each of the machine's addresses, if it listens on all of them. */
function addresses({ hostname, port }: Deno.NetAddr, scheme: string): string[] {
  const name = (address: string) => `${scheme}://${address.includes(":") ? `[${address}]` : address}:${port}/`;
  if (hostname !== "0.0.0.0" && hostname !== "::") return [name(hostname)];
  const { state } = Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" });
  const interfaces = state === "granted" ? Deno.networkInterfaces() : [];
  const reachable = interfaces.filter(({ address, scopeid }) =>
    !scopeid && (hostname === "::" || !address.includes(":"))
  );
  return ["localhost", ...reachable.map(({ address }) => address)].map(name);
}

/** Says where the chat is, and who can come. */
function announce(addr: Deno.NetAddr, { password, tlsCert }: ChatOptions): void {
  const urls = addresses(addr, tlsCert ? "https" : "http");
  console.log(`The chat is open: ${urls.join("  ")}`);
  const local = /^(127\.|::1$|localhost$)/.test(addr.hostname);
  if (!local && !password) {
    console.log("Whoever can reach it can read and write. CHAT_PASSWORD would keep it closed.");
  }
}

if (import.meta.main) {
  try {
    const options = environment();
    const chat = await startChat(options);
    if (options.log ?? DEFAULTS.log) announce(chat.addr, options);
    const end = async () => {
      await chat.shutdown();
      Deno.exit();
    };
    Deno.addSignalListener("SIGINT", end);
    if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", end);
  } catch (error) {
    const { message } = error as Error;
    const taken = error instanceof Deno.errors.AddrInUse;
    console.error(`The chat cannot start: ${taken ? "the port is taken, set PORT to another" : message}`);
    Deno.exit(1);
  }
}
