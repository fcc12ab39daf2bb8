// What is known, in short: message Summary of mesh.proto. Those who agree need not exchange digests.
import { createHash } from 'node:crypto'
import { big } from './wire.js'

const BUCKETS = 64
const NOTHING = Buffer.alloc(8)

const sha256 = (data) => createHash('sha256').update(data).digest()

const bucketOf = (key) => sha256(key)[0] % BUCKETS

/** Whether a Digest about `part` has the row of this peer; without a part it has all. */
export const covers = (part, key) => part === null || part.buckets.includes(bucketOf(key))

function fingerprint (rows) {
  return rows.length === 0 ? NOTHING : sha256(Buffer.concat(rows.sort(Buffer.compare))).subarray(0, 8)
}

function row ({ peerKey, incarnation, sequence, dead }) {
  const tail = Buffer.alloc(17)
  tail.writeBigUInt64BE(big(incarnation), 0)
  tail.writeBigUInt64BE(big(sequence), 8)
  tail.writeUInt8(dead ? 1 : 0, 16)
  return Buffer.concat([peerKey, tail])
}

/** The fingerprints of a whole Digest, and of revocations as `link id | signer's key`. */
export function summary ({ entries }, revocations) {
  const buckets = Array.from({ length: BUCKETS }, () => [])
  for (const entry of entries) buckets[bucketOf(entry.peerKey)].push(row(entry))
  const parts = Buffer.concat([...buckets.map(fingerprint), fingerprint(revocations)])
  return { fingerprint: sha256(parts).subarray(0, 16), parts }
}

/** The Part in which two summaries differ; null if they do not. */
export function difference (mine, theirs) {
  const differ = (i) => Buffer.compare(mine.subarray(8 * i, 8 * i + 8), theirs.subarray(8 * i, 8 * i + 8)) !== 0
  const buckets = Array.from({ length: BUCKETS }, (_, i) => i).filter(differ)
  const revocations = differ(BUCKETS)
  return buckets.length > 0 || revocations ? { buckets: Buffer.from(buckets), revocations } : null
}
