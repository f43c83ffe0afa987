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
}

/** A chat that runs. `await using` shuts it down at the end of the block. */
export interface Chat extends AsyncDisposable {
  /** Where it listens. */
  readonly addr: Deno.NetAddr;
  /** Writes down what is pending, closes every socket with 1001, and resolves when the server has ended. */
  shutdown(): Promise<void>;
}

const MAX_USERNAME = 40; // UTF-16 units, as maxlength counts
const MAX_MESSAGE = 2000; // UTF-16 units
const MAX_FRAME = 64 * 1024; // bytes of a frame from a client: far over every limit
const MAX_UNSENT = 1024 * 1024; // bytes that wait for one slow reader before it is cut off
const MAX_QUEUE = 16 * 1024 * 1024; // UTF-16 units of messages that wait for the database
const MAX_VALUE = 64 * 1024; // bytes of one value in KV, and so of one entry in the log
const MAX_TURNS = 20; // turns of the event loop that arriving messages are waited for
const SERVED = 16; // sockets that are sent a frame at a time
const MAX_DELETES = 500; // entries that one commit deletes: KV takes 1000 changes at most
const PAGE = 200; // messages that a join without `since`, or a request for history, is answered with
const MAX_BACKLOG = 192 * 1024; // UTF-16 units of older messages in one frame
const GATHER = 100; // ms in which presence and typing are gathered into one frame
const MAX_TYPING = 10; // names that are told to be typing at once
const POLL = 1000; // ms between looks at what other instances wrote
const ROSTER = 500; // names in one value in KV
const HEARTBEAT = 10_000; // ms after which an instance renews its roster
const PRESUMED_DEAD = 30_000; // ms after which a roster that was not renewed is out of date
const RETRY = { first: 25, most: 2000, silent: 3 }; // ms before a failed write is tried again; failures to report
const DRAIN = 20; // ms between looks whether a slow reader took what it was sent
const STALL = 30_000; // ms that a reader of its backlog may take nothing
const REPORT = 8; // messages of one batch that are logged with a line each
const SHUTDOWN = 1000; // ms that the shutdown waits for the database, and for the network

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));
const wait = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** Waits for the promise, but no longer than `ms`. */
async function within(ms: number, promise: Promise<unknown> | undefined): Promise<void> {
  let timer;
  await Promise.race([promise, new Promise((resolve) => timer = setTimeout(resolve, ms))]);
  clearTimeout(timer);
}

// ─────────────────────────────────────────────── Events on the wire ───────────────────────────────────────────────

/** What a client may send, once {@linkcode check} has seen it. */
type Incoming =
  | { event: "send_message"; username: string; message: string; id?: string }
  | { event: "join"; username?: string; since?: number; password?: string }
  | { event: "history"; before: number }
  | { event: "typing" }
  | { event: "ping" }
  | Refusal;

/** What a client is told when something cannot be accepted. `retry_after` is in milliseconds. */
type Refusal = { event: "error"; error: string; id?: string; retry_after?: number };

/** The order of the fields on the wire; the sequence number and the time come before it. */
const body = (username: string, message: string, id?: string) =>
  `"username":${JSON.stringify(username)},"message":${JSON.stringify(message)}${id ? `,"id":"${id}"` : ""}}`;

const line = (seq: number, time: number, body: string) =>
  `{"event":"receive_message","seq":${seq},"time":${time},${body}`;

// ─────────────────────────────────────────── Checking what a client sends ───────────────────────────────────────────

const INVISIBLE = /[[\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]--[\t-\r]]/gv;
const ID = /^[\w-]{1,64}$/;

/** A name as it is shown: nothing in it can hide, reorder a line, or start another one. */
const cleanName = (name: string) => name.toWellFormed().replace(INVISIBLE, "").replace(/\s+/g, " ").trim();

/** Everything that a client may send is checked here. */
function check(frame: string): Incoming {
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
      return { event, username: name, message: text.toWellFormed().replaceAll("\0", "\ufffd"), id };
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

const isWhole = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

const refusal = (error: string, id?: string, retry_after?: number): Refusal => ({
  event: "error",
  error,
  id,
  retry_after,
});

// ──────────────────────────────────────────────────── The log ────────────────────────────────────────────────────

/** A message that was accepted and is not written yet. */
interface Pending {
  username: string;
  message: string;
  id?: string;
  /** Its part of the line on the wire; the start comes when its place in the order is known. */
  body: string;
}

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
  written(entry: Entry, accepted?: Pending[]): Promise<void>;
  /** The database holds something else than what was shown: everyone has to start over. */
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
  #queue: Pending[] = [];
  #queued = 0; // UTF-16 units in the queue
  #attempt = ""; // the text that a commit tried to write, while it is not known whether it did
  #behind = true; // another instance has written, or may have
  #working?: Promise<void>;
  #failures = 0;
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
  append(message: Pending): boolean {
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
    this.#behind = false;
    this.#take(this.#queue.length);
  }

  #work(): Promise<void> {
    return this.#working ??= this.#loop().finally(() => this.#working = undefined);
  }

  /** Reads what others wrote, writes what is waiting: as long as there is any of it. */
  async #loop(): Promise<void> {
    while (this.#behind || this.#queue.length > 0) {
      try {
        await (this.#behind ? this.#pull() : this.#commit());
        if (this.#failures >= RETRY.silent) console.error("The database works again");
        this.#failures = 0;
      } catch (error) {
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
  #take(count: number): Pending[] {
    const taken = this.#queue.splice(0, count);
    for (const { body } of taken) this.#queued -= body.length;
    return taken;
  }

  /** Makes an entry that is written known, here and to the room. */
  async #add(entry: Entry, messages: { id?: string }[], accepted?: Pending[]): Promise<void> {
    let seq = entry.first;
    for (const { id } of messages) {
      if (id) this.#ids.set(id, seq);
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
    if (this.head > 0) this.#events.replaced();
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

  /** Everyone, as last told. */
  roster(): string {
    return JSON.stringify({ event: "presence", online: this.#told.online, users: [...this.#told.users] });
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
    if (!this.#dirty && (this.#online === 0 || now - this.#published < HEARTBEAT)) return;
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
};

/** Everyone who is connected, and what they are sent. */
class Room {
  readonly #sockets = new Set<Client>();
  readonly #log: Log;
  readonly #presence: Presence;
  readonly #print: (text: string) => void;
  readonly #newcomers = new Set<Client>(); // joined since the room was last told who is here
  readonly #typing = new Set<string>(); // names that typed since then
  #telling?: ReturnType<typeof setTimeout>; // the timer of the next news
  #looking?: ReturnType<typeof setTimeout>; // the timer of the next look at other instances
  #closed = false;

  constructor(kv: Deno.Kv, { history, log }: { history: number; log: boolean }) {
    this.#log = new Log(kv, history, {
      written: (entry, accepted) => this.#broadcast(entry, accepted),
      replaced: () => this.#sockets.forEach((client) => this.#close(client, 1013, "the room was replaced")),
    });
    this.#presence = new Presence(kv);
    this.#print = log ? console.log : () => {};
  }

  /** Resolves when the log is read. Throws what the database throws. */
  async open(): Promise<void> {
    await this.#log.look();
    this.#look();
  }

  /** Takes a socket in: once it is open it gets every message. */
  add(socket: WebSocket): void {
    const client: Client = Object.assign(socket, { joined: false, seen: 0, joins: 0, unsent: 0 });
    client.onopen = () => {
      client.seen = this.#log.head;
      this.#sockets.add(client);
    };
    client.onclose = () => this.#leave(client);
    client.onmessage = ({ data }) => {
      const failed = (error: Error) => {
        console.error("A connection failed:", error.message);
        this.#close(client, 1011, "the server made a mistake");
      };
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
    clearTimeout(this.#looking);
    await within(SHUTDOWN, this.#presence.exchange().catch(() => {})); // else it is presumed dead, later
  }

  /** Closes a connection. It has left at once: one that does not read would not let itself be closed. */
  #close(client: Client, code: number, reason: string): void {
    client.close(code, reason);
    this.#leave(client);
  }

  #leave(client: Client): void {
    if (!this.#sockets.delete(client) || !client.joined) return;
    this.#newcomers.delete(client);
    this.#presence.count(client.username, -1);
    this.#news();
  }

  /** Does what a frame asks for. */
  #receive(client: Client, frame: unknown): Promise<void> | void {
    if (this.#closed) return; // unconfirmed: the client sends it again, to whoever comes next
    if (typeof frame !== "string") return this.#refuse(client, refusal("a frame must be text, not binary"));
    if (frame.length > MAX_FRAME / 3 && new Blob([frame]).size > MAX_FRAME) {
      return this.#close(client, 1009, `a frame may have ${MAX_FRAME} bytes`);
    }
    const incoming = check(frame);
    switch (incoming.event) {
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
      case "error":
        return this.#refuse(client, incoming);
    }
  }

  #refuse(client: Client, refusal: Refusal): void {
    this.#send(client, JSON.stringify(refusal));
  }

  #accept(client: Client, { id, username, message }: Incoming & { event: "send_message" }): void {
    const known = id && this.#log.find(id);
    if (known) {
      // What is being written, or is still to come in its backlog, comes back by itself.
      if (known <= client.seen) this.#send(client, this.#log.from(known).text.split("\n", 1)[0]);
      return;
    }
    if (this.#log.append({ id, username, message, body: body(username, message, id) })) return;
    this.#refuse(client, refusal("the room is not able to keep more just now: try again in 1 s", id, 1000));
  }

  #join(client: Client, { username, since }: Incoming & { event: "join" }): Promise<void> | void {
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
  async #broadcast({ first, last, text, bytes }: Entry, accepted?: Pending[]): Promise<void> {
    if (accepted) this.#report(first, accepted);
    let served = 0, lines: string[] | undefined;
    for (const client of this.#sockets) {
      if (client.seen !== first - 1) continue;
      client.seen = last;
      if (client.joined) this.#send(client, text, bytes);
      else for (const line of lines ??= text.split("\n")) this.#send(client, line);
      if (++served % SERVED === 0) await turn();
    }
  }

  #report(first: number, accepted: Pending[]): void {
    if (accepted.length > REPORT) {
      return this.#print(`Message received: ${accepted.length} at once, from ${first} on`);
    }
    for (const [i, { username, message }] of accepted.entries()) {
      this.#print(
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
    this.#telling ??= setTimeout(() => {
      this.#telling = undefined;
      const changes = this.#presence.changes();
      const roster = this.#newcomers.size > 0 ? this.#presence.roster() : undefined;
      const typing = [...this.#typing].slice(0, MAX_TYPING);
      const frame = (first?: string, self?: string) =>
        [
          ...(first ? [first] : []),
          ...typing.filter((name) => name !== self).map((username) =>
            JSON.stringify({ event: "typing", username })
          ),
        ].join("\n");
      const forMost = frame(changes);
      for (const client of this.#sockets) {
        if (!client.joined) continue;
        const own = this.#newcomers.has(client) || this.#typing.has(client.username ?? "");
        const news = own ? frame(this.#newcomers.has(client) ? roster : changes, client.username) : forMost;
        if (news) this.#send(client, news);
      }
      this.#newcomers.clear();
      this.#typing.clear();
    }, GATHER);
  }

  /** Sees what other instances did, and lets them see this one, every {@linkcode POLL}. */
  async #look(): Promise<void> {
    try {
      await this.#log.look();
      await this.#presence.exchange();
      this.#news();
    } catch {
      // The database fails. The log says so when there is something to write; the next look comes anyway.
    }
    if (!this.#closed) this.#looking = setTimeout(() => this.#look(), POLL);
  }
}

// ───────────────────────────────────────────────────── HTTP ─────────────────────────────────────────────────────

/** Headers of the page: it may run its own script and style, talk to its own server, and nothing else. */
async function pageHeaders(): Promise<Headers> {
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
  return new Headers({
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-cache",
    "content-security-policy": policy.join("; "),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
  });
}

const text = (status: number, body: string, headers?: HeadersInit) =>
  new Response(`${body}\n`, { status, headers });

const isHandshake = ({ headers }: Request) => headers.get("upgrade")?.toLowerCase() === "websocket";

/** Answers a handshake with a socket for the room. */
function upgrade(request: Request, room: Room): Response {
  try {
    const { socket, response } = Deno.upgradeWebSocket(request);
    room.add(socket);
    return response;
  } catch {
    return text(400, "This is not a WebSocket handshake");
  }
}

/** Answers any other request: with the page, or with what is wrong. */
function respond(request: Request, headers: Headers): Response {
  const { pathname } = new URL(request.url);
  if (pathname !== "/" && pathname !== "/healthz") return text(404, "Not found");
  if (request.method !== "GET" && request.method !== "HEAD") {
    return text(405, "Method not allowed", { allow: "GET, HEAD" });
  }
  return pathname === "/" ? new Response(page, { headers }) : text(200, "ok");
}

// ───────────────────────────────────────────────────── Start ─────────────────────────────────────────────────────

/**
 * Starts a chat server. It serves the page at `/` and upgrades WebSockets on any path.
 *
 * Throws `Deno.errors.AddrInUse` if the port is taken, and what `Deno.openKv` throws.
 *
 * ```ts
 * import { startChat } from "./main.ts";
 *
 * await using chat = await startChat({ port: 0, db: ":memory:" });
 * console.log(chat.addr.port);
 * ```
 */
export async function startChat(options: ChatOptions = {}): Promise<Chat> {
  const { port = 8000, hostname = "127.0.0.1", db, history = 10_000, log = true } = options;
  // The database opens while the page is served already; sockets wait for it.
  const opening = (async () => {
    const kv = typeof db === "object" ? db : await Deno.openKv(db);
    const room = new Room(kv, { history, log });
    await room.open();
    return { kv, room };
  })();
  const headers = pageHeaders();
  const server = Deno.serve(
    { port, hostname, onListen() {} },
    async (request) =>
      isHandshake(request) ? upgrade(request, (await opening).room) : respond(request, await headers),
  );
  let ending: Promise<void> | undefined;
  const { kv, room } = await opening.catch(async (error) => {
    await server.shutdown();
    throw error;
  });
  const shutdown = () =>
    ending ??= (async () => {
      await room.close();
      await within(SHUTDOWN, server.shutdown());
      if (kv !== db) kv.close();
    })();
  return { addr: server.addr, shutdown, [Symbol.asyncDispose]: shutdown };
}

/** The settings that the environment names. Throws a `RangeError` for one that makes no sense. */
function settings(): ChatOptions {
  const get = (name: string) => Deno.env.get(name) || undefined;
  const whole = (name: string, least: number, most: number) => {
    const value = get(name) && Number(get(name));
    if (value === undefined || isWhole(value) && value >= least && value <= most) return value;
    throw new RangeError(`${name} must be a whole number from ${least} to ${most}, not "${get(name)}"`);
  };
  const log = get("LOG") ?? "on";
  if (log !== "on" && log !== "off") throw new RangeError(`LOG must be on or off, not "${log}"`);
  return {
    port: whole("PORT", 0, 65_535),
    hostname: get("HOST"),
    db: get("CHAT_DB"),
    history: whole("CHAT_HISTORY", 1, 10_000_000),
    log: log === "on",
  };
}

/** Where the page can be opened: each of the machine's addresses, if it listens on all of them. */
function addresses({ hostname, port }: Deno.NetAddr): string[] {
  const name = (address: string) => `http://${address.includes(":") ? `[${address}]` : address}:${port}/`;
  if (hostname !== "0.0.0.0" && hostname !== "::") return [name(hostname)];
  const { state } = Deno.permissions.querySync({ name: "sys", kind: "networkInterfaces" });
  const interfaces = state === "granted" ? Deno.networkInterfaces() : [];
  const reachable = interfaces.filter(({ address, scopeid }) =>
    !scopeid && (hostname === "::" || !address.includes(":"))
  );
  return ["localhost", ...reachable.map(({ address }) => address)].map(name);
}

if (import.meta.main) {
  try {
    const options = settings();
    const chat = await startChat(options);
    if (options.log) console.log(`The chat is open: ${addresses(chat.addr).join("  ")}`);
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
